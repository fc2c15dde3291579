// A websocket server that speaks just enough of Streaming v3 to be the far end of a benchmark, and costs little: one thread, epoll,
// OpenSSL if a certificate is given. Build: cc -O2 -o far_end far_end.c -lssl -lcrypto.   Run: far_end [certificate.pem]
//
// Each session gets Begin, five Turns a second (438 to 2428 bytes, one in seventeen ends its turn), and Termination after Terminate.
// The first binary message of a session sets its clock: message n of `ms` milliseconds of audio is due n * ms later, and how late
// each came goes into a histogram. Commands on stdin, answered by a line: "reset <ms>" begins a new measurement for chunks of that
// length, "stats" prints JSON: sessions open, chunks, and the p50, p99 and highest lateness in ms of that measurement.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/evp.h>
#include <openssl/sha.h>
#include <openssl/ssl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

#define MOST 8192
#define INBOX 65536
#ifndef PER_SECOND
#define PER_SECOND 5
#endif
#define PARTIALS 16  // and then the final
#define BINS 200000  // of 0.1 ms

struct peer {
    int fd, live, shaken, order, partial;
    SSL *tls;
    double next_turn, start, chunk_s;
    long chunks;
    size_t have;
    unsigned char in[INBOX];
};

static struct peer *peers[MOST];
static long bins[BINS], total;
static double highest, chunk_s = 0.05;
static SSL_CTX *context;
static int queue;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void drop(struct peer *p) {
    peers[p->fd] = NULL;
    if (p->tls) SSL_free(p->tls);
    close(p->fd);
    free(p);
}

// What the socket does not take is dropped with the peer: a client that stops reading has lost.
static void put(struct peer *p, const void *data, size_t size) {
    if (p->live < 0) return;
    long sent = p->tls ? SSL_write(p->tls, data, size) : send(p->fd, data, size, MSG_NOSIGNAL);
    if (sent != (long)size) p->live = -1;
}

static void say(struct peer *p, int opcode, const char *text, size_t size) {
    static unsigned char frame[70000];
    size_t head = 2;
    frame[0] = 0x80 | opcode;
    if (size < 126) frame[1] = size;
    else frame[1] = 126, frame[2] = size >> 8, frame[3] = size, head = 4;
    memcpy(frame + head, text, size);
    put(p, frame, head + size);
}

static void turn(struct peer *p) {
    static char text[8192];
    int final = p->partial == PARTIALS, words = 3 + p->partial * 19 / PARTIALS;
    size_t at = sprintf(text, "{\"type\":\"Turn\",\"turn_order\":%d,\"turn_is_formatted\":%s,\"end_of_turn\":%s,\"transcript\":\"", p->order,
                        final ? "true" : "false", final ? "true" : "false");
    at += sprintf(text + at, "at%ld", (long)(now() * 1e6));  // the first word says when it was sent
    for (int i = 1; i < words; i++) at += sprintf(text + at, " word%d", i);
    at += sprintf(text + at, "\",\"end_of_turn_confidence\":%s,\"words\":[", final ? "0.91" : "0.01");
    for (int i = 0; i < words; i++)
        at += sprintf(text + at, "%s{\"text\":\"word%d\",\"word_is_final\":%s,\"start\":%d,\"end\":%d,\"confidence\":0.98765}", i ? "," : "",
                      i, final || i < words - 1 ? "true" : "false", p->order * 3400 + i * 150, p->order * 3400 + i * 150 + 120);
    at += sprintf(text + at, "]}");
    say(p, 1, text, at);
    p->partial = final ? 0 : p->partial + 1;
    p->order += final;
}

static void arrived(struct peer *p, double at) {
    if (p->chunk_s != chunk_s || !p->chunks) p->start = at, p->chunks = 0, p->chunk_s = chunk_s;
    double late = at - p->start - p->chunks++ * p->chunk_s;
    if (late < 0) p->start += late, late = 0;  // an earlier one was late itself: the clock is set by the most punctual
    long bin = late * 10000;
    bins[bin < BINS ? bin : BINS - 1]++;
    total++;
    if (late > highest) highest = late;
}

static void upgrade(struct peer *p) {
    p->in[p->have] = 0;
    char *end = strstr((char *)p->in, "\r\n\r\n"), *key = strcasestr((char *)p->in, "sec-websocket-key: ");
    if (!end || !key) return;
    char both[64], answer[256], begin[160];
    unsigned char digest[20], accept[32];
    sprintf(both, "%.24s258EAFA5-E914-47DA-95CA-C5AB0DC85B11", key + 19);
    SHA1((unsigned char *)both, 60, digest);
    EVP_EncodeBlock(accept, digest, 20);
    put(p, answer, sprintf(answer, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n", accept));
    static long sessions;
    double at = now();
    say(p, 1, begin, sprintf(begin, "{\"type\":\"Begin\",\"id\":\"%08lx-0000-4000-8000-%012lx\",\"expires_at\":%ld}", sessions, (long)(at * 1000), time(NULL) + 10800));
    p->next_turn = at + 1.0 / PER_SECOND * (sessions * 7 % 40) / 40;
    p->partial = sessions++ % (PARTIALS + 1);
    p->live = p->live < 0 ? -1 : 1;
    p->have -= end + 4 - (char *)p->in;
    memmove(p->in, end + 4, p->have);
}

static void frames(struct peer *p) {
    size_t at = 0;
    double stamp = now();
    while (p->have - at >= 6) {
        unsigned char *f = p->in + at;
        size_t size = f[1] & 127, head = 6;
        if (size == 126) size = f[2] << 8 | f[3], head = 8;
        if (p->have - at < head + size) break;
        int opcode = f[0] & 15;
        for (size_t i = 0; opcode != 2 && i < size; i++) f[head + i] ^= f[head - 4 + i % 4];
        if (opcode == 2) arrived(p, stamp);
        else if (opcode == 9) say(p, 10, (char *)f + head, size);
        else if (opcode == 8) say(p, 8, (char *)f + head, size < 2 ? 0 : 2), p->live = -1;
        else if (opcode == 1 && memmem(f + head, size, "Terminate", 9)) {
            char text[160];
            long seconds = p->chunks * p->chunk_s + 0.5;
            say(p, 1, text, sprintf(text, "{\"type\":\"Termination\",\"audio_duration_seconds\":%ld,\"session_duration_seconds\":%ld}", seconds, seconds));
            say(p, 8, "\x03\xe8", 2);
            p->next_turn = 1e18;
        }
        at += head + size;
    }
    p->have -= at;
    memmove(p->in, p->in + at, p->have);
}

static void readable(struct peer *p) {
    if (p->tls && !p->shaken) {
        int done = SSL_accept(p->tls);
        if (done == 1) p->shaken = 1;
        else if (SSL_get_error(p->tls, done) != SSL_ERROR_WANT_READ) p->live = -1;
        if (done != 1) return;
    }
    for (;;) {
        if (p->have >= INBOX - 1) { p->live = -1; return; }
        long got = p->tls ? SSL_read(p->tls, p->in + p->have, INBOX - 1 - p->have) : recv(p->fd, p->in + p->have, INBOX - 1 - p->have, 0);
        if (got <= 0) {
            int again = p->tls ? SSL_get_error(p->tls, got) == SSL_ERROR_WANT_READ : got < 0 && errno == EAGAIN;
            if (!again) p->live = -1;
            return;
        }
        p->have += got;
        if (p->live == 0) upgrade(p);
        if (p->live == 1) frames(p);
        if (p->live < 0) return;
        if (p->tls ? !SSL_has_pending(p->tls) : p->have + got < INBOX - 1) return;  // nothing is left, or epoll says it again
    }
}

static void welcome(int listening) {
    int fd, on = 1;
    while ((fd = accept4(listening, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        struct peer *p = fd < MOST ? calloc(1, sizeof *p) : NULL;
        if (!p) { close(fd); continue; }
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        p->fd = fd;
        if (context) p->tls = SSL_new(context), SSL_set_fd(p->tls, fd), SSL_set_accept_state(p->tls);
        peers[fd] = p;
        struct epoll_event event = {.events = EPOLLIN, .data.fd = fd};
        epoll_ctl(queue, EPOLL_CTL_ADD, fd, &event);
    }
}

static double part(double share) {
    long seen = 0;
    for (long i = 0; i < BINS; i++)
        if ((seen += bins[i]) >= total * share && seen) return (i + 1) / 10.0;
    return 0;
}

static int command(void) {
    char line[64];
    long got = read(0, line, sizeof line - 1);
    if (got <= 0) return 0;
    line[got] = 0;
    if (!strncmp(line, "reset", 5)) {
        memset(bins, 0, sizeof bins);
        total = 0, highest = 0;
        if (atof(line + 5) > 0) chunk_s = atof(line + 5) / 1000;
        puts("{}");
    } else {
        int live = 0;
        for (int fd = 0; fd < MOST; fd++) live += peers[fd] && peers[fd]->live == 1;
        printf("{\"sessions\":%d,\"chunks\":%ld,\"p50\":%.1f,\"p99\":%.1f,\"max\":%.1f}\n", live, total, part(0.5), part(0.99), highest * 1000);
    }
    fflush(stdout);
    return 1;
}

int main(int count, char **arguments) {
    signal(SIGPIPE, SIG_IGN);  // OpenSSL writes without MSG_NOSIGNAL
    if (count > 1) {
        context = SSL_CTX_new(TLS_server_method());
        SSL_CTX_set_mode(context, SSL_MODE_RELEASE_BUFFERS);
        SSL_CTX_set_read_ahead(context, 1);  // a record in one system call, not two
        if (SSL_CTX_use_certificate_chain_file(context, arguments[1]) != 1 || SSL_CTX_use_PrivateKey_file(context, arguments[1], SSL_FILETYPE_PEM) != 1) return 1;
    }
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listening = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (bind(listening, (struct sockaddr *)&address, size) || listen(listening, 4096) || getsockname(listening, (struct sockaddr *)&address, &size)) return 1;
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    queue = epoll_create1(0);
    struct epoll_event own[2] = {{.events = EPOLLIN, .data.fd = 0}, {.events = EPOLLIN, .data.fd = listening}}, events[512];
    epoll_ctl(queue, EPOLL_CTL_ADD, 0, &own[0]);
    epoll_ctl(queue, EPOLL_CTL_ADD, listening, &own[1]);
    double next = now();
    for (;;) {
        int wait = (next - now()) * 1000, ready = epoll_wait(queue, events, 512, wait > 0 ? wait : 0);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            if (fd == 0) { if (!command()) return 0; }
            else if (fd == listening) welcome(listening);
            else if (peers[fd]) {
                readable(peers[fd]);
                if (peers[fd]->live < 0) drop(peers[fd]);
            }
        }
        double at = now();
        if (at < next) continue;
        next = at + 0.005;
        for (int fd = 0; fd < MOST; fd++) {
            struct peer *p = peers[fd];
            if (!p || p->live != 1 || p->next_turn > at) continue;
            turn(p);
            p->next_turn += 1.0 / PER_SECOND;
            if (p->live < 0) drop(p);
        }
    }
}
