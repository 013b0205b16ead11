# 3.13 is the newest Python for which every locked dependency has a ready-made package
# (immutables has none for 3.14 yet): nothing is compiled here, and no compiler is needed.
ARG PYTHON=3.13-slim-bookworm

FROM python:${PYTHON} AS build
WORKDIR /build
RUN python -m venv --without-pip /opt/relay
COPY requirements.lock .
RUN pip --python /opt/relay/bin/python install --no-cache-dir --no-compile --only-binary :all: \
      --require-hashes -r requirements.lock
COPY relay relay
# The root may be read-only: everything is compiled now, and stays valid whatever the file times.
RUN cp -r relay "$(/opt/relay/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
 && python -m compileall -q --invalidation-mode unchecked-hash /opt/relay/lib \
 && printf '#!/opt/relay/bin/python\nfrom relay.__main__ import main\n\nmain()\n' \
      > /opt/relay/bin/relay \
 && chmod 755 /opt/relay/bin/relay

FROM python:${PYTHON}
LABEL org.opencontainers.image.title="Relay" \
      org.opencontainers.image.description="A fast drop-in replacement for the LaunchDarkly Relay Proxy" \
      org.opencontainers.image.licenses="Apache-2.0"
# Uid 1000, port 8030, /usr/bin/ldr, /ldr/ld-relay.conf: the contract of the image that this one
# replaces, so that changing the image's name is enough. OpenShift runs it as another user, who is
# in group 0: /data is that group's as well, and so is what is made in it (the 2).
RUN useradd --uid 1000 --user-group --no-create-home --shell /usr/sbin/nologin relay \
 && install -d -o 1000 -g 0 -m 2770 /data \
 && install -d /ldr \
 && ln -s /opt/relay/bin/relay /usr/bin/ldr \
 && ln -s /opt/relay/bin/relay /usr/bin/relay
COPY --from=build /opt/relay /opt/relay
COPY config /opt/relay/config
COPY LICENSE /opt/relay/
ENV PORT=8030 \
    SNAPSHOT_DIR=/data/snapshots \
    EVENTS_SPOOL_DIR=/data/events \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 1000:1000
WORKDIR /
EXPOSE 8030
VOLUME /data
STOPSIGNAL SIGTERM
# The first check comes after one interval, on all engines: a start period would make it 5 s on
# newer ones, and the option for that is an error on those before 25. Unhealthy after 30 s.
HEALTHCHECK --interval=1.5s --timeout=3s --retries=20 \
  CMD ["relay", "health"]
ENTRYPOINT ["/usr/bin/ldr", "--config", "/ldr/ld-relay.conf", "--allow-missing-file", "--from-env"]
