# One image for `serve`, `worker`, `migrate` and `sandbox`.
# Build: every package by its hash, then Turnwire itself without any network.
FROM python:3.12-slim-trixie AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
RUN python -m venv /opt/turnwire
WORKDIR /src
COPY deploy/requirements.lock deploy/
RUN /opt/turnwire/bin/pip install --require-hashes --only-binary :all: -r deploy/requirements.lock
COPY pyproject.toml README.md ./
COPY service service
RUN /opt/turnwire/bin/pip install --no-deps --no-build-isolation . \
 && /opt/turnwire/bin/pip check \
 && /opt/turnwire/bin/pip uninstall -y hatchling packaging pathspec pluggy tomlkit trove-classifiers pip

# Run: no compiler, no pip, no root. Only /data is written, and /tmp by `transcribe`: the root may be read-only.
FROM python:3.12-slim-trixie
RUN groupadd --gid 10001 turnwire \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin turnwire \
 && install -d -m 0700 -o 10001 -g 10001 /data
COPY --from=build /opt/turnwire /opt/turnwire
# All addresses, or no port could be published; that starts only with API keys or TURNWIRE_AUTH=none.
ENV PATH=/opt/turnwire/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    TURNWIRE_DATA_DIR=/data TURNWIRE_HOST=0.0.0.0
USER 10001:10001
EXPOSE 8000
# For `serve` and `worker`, which listen on TURNWIRE_PORT; the others are asked otherwise or not at all.
# Not urllib, which would ask a proxy of the environment for 127.0.0.1.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --start-interval=1s --retries=3 \
    CMD ["python", "-c", "import http.client, os, sys; c = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('TURNWIRE_PORT') or 8000), timeout=4); c.request('GET', '/healthz'); sys.exit(c.getresponse().status != 200)"]
# Exec form: SIGTERM reaches Turnwire itself, which drains and exits 0.
ENTRYPOINT ["turnwire"]
CMD ["serve"]
