# docker build -t moed .
# docker run --rm -p 127.0.0.1:8000:8000 -v /path/to/checkpoint:/models:ro -e MOED_API_KEY=secret moed
# A snapshot folder of the hub's cache holds links into ../../blobs: mount the model's whole folder of the cache and name the
# snapshot in it (moed serve --model /models/snapshots/... --host 0.0.0.0). Set other ports by MOED_HTTP_PORT and
# MOED_GRPC_PORT, not by flags: the health check sees these alone.
# Inside the container the daemon binds every address, so it wants a key; `--insecure` waives it (deploy/compose.yaml
# does, and publishes on loopback only).
# Without CUDA: cublasLt alone is five times as large as all else. On a machine with a GPU, `make serve`.
ARG BASE=debian:bookworm-slim

FROM ${BASE} AS build
WORKDIR /src
COPY tools/install_deps.sh tools/
RUN tools/install_deps.sh build
COPY . .
RUN cmake --preset release -DBUILD_TESTING=OFF --log-level=WARNING \
 && cmake --build build/release --target moed -j "$(nproc)" \
 && strip -o /moed build/release/server/moed

FROM ${BASE}
COPY tools/install_deps.sh /tmp/tools/
RUN /tmp/tools/install_deps.sh runtime && rm -rf /tmp/tools /tmp/build /var/lib/apt/lists/* \
 && mkdir /models && useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin moed
COPY --from=build /moed /usr/local/bin/moed
USER 10001
EXPOSE 8000 50051
STOPSIGNAL SIGTERM
# A big checkpoint loads for minutes: until it has, a failing check does not count.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m CMD ["/usr/local/bin/moed", "health"]
ENTRYPOINT ["/usr/local/bin/moed"]
CMD ["serve", "--model", "/models", "--host", "0.0.0.0"]
