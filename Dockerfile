# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build --target cpu  -t lorad:cpu  .
#   docker build --target cuda -t lorad:cuda --build-arg CUDA_COMPUTE_CAP=86 .
# Both run as an unprivileged user, write only below /data and /tmp, and check their own health.
ARG RUST_VERSION=1.95
ARG DEBIAN=bookworm
ARG CUDA_VERSION=12.6.3

# ---- cpu ----------------------------------------------------------------------------------------------------------------
FROM rust:${RUST_VERSION}-${DEBIAN} AS build-cpu
WORKDIR /src
COPY . .
# The caches keep a rebuild to the crates that changed; the binary is copied out, because a cache is no part of a layer.
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/src/target,id=lorad-target-cpu,sharing=locked \
    cargo build --release --locked --bin lorad && \
    install -D -s target/release/lorad /out/lorad

FROM debian:${DEBIAN}-slim AS cpu
# ca-certificates: models and webhooks come over TLS. tini reaps the worker processes and passes signals on.
RUN apt-get update && \
    apt-get install -y --no-install-recommends ca-certificates tini && \
    rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 10001 lorad && \
    useradd --uid 10001 --gid lorad --home-dir /data --no-create-home --shell /usr/sbin/nologin lorad && \
    install -d -o lorad -g lorad /data
COPY --from=build-cpu /out/lorad /usr/local/bin/lorad
COPY LICENSE-APACHE LICENSE-MIT assets/NOTICE /usr/share/doc/lorad/
ENV LORAD_STORAGE__DATA_DIR=/data
USER lorad
WORKDIR /data
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=20s --retries=3 CMD ["lorad", "healthcheck"]
ENTRYPOINT ["tini", "--", "lorad"]
# Inside a container loopback is reachable by nobody, so the server listens on all of the container's addresses. Who may reach it
# is decided where the port is published: on 127.0.0.1 in docker-compose.yml. Set up API keys before publishing it wider.
CMD ["serve", "--bind", "0.0.0.0:8080", "--insecure-no-auth"]

# ---- cuda ---------------------------------------------------------------------------------------------------------------
FROM nvidia/cuda:${CUDA_VERSION}-devel-ubuntu22.04 AS build-cuda
ARG RUST_VERSION
# One architecture per build: 80 A100, 86 RTX 30, 89 RTX 40 and L4, 90 H100. Newer cards run older code through the driver.
ARG CUDA_COMPUTE_CAP=80
ENV CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP} \
    RUSTUP_HOME=/usr/local/rustup \
    CARGO_HOME=/usr/local/cargo \
    PATH=/usr/local/cargo/bin:${PATH}
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update && \
    apt-get install -y --no-install-recommends build-essential ca-certificates curl pkg-config && \
    rm -rf /var/lib/apt/lists/* && \
    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | \
    sh -s -- -y --profile minimal --default-toolchain "${RUST_VERSION}"
WORKDIR /src
COPY . .
RUN --mount=type=cache,target=/usr/local/cargo/registry,sharing=locked \
    --mount=type=cache,target=/src/target,id=lorad-target-cuda,sharing=locked \
    cargo build --release --locked --features cuda --bin lorad && \
    install -D -s target/release/lorad /out/lorad

FROM nvidia/cuda:${CUDA_VERSION}-runtime-ubuntu22.04 AS cuda
RUN apt-get update && \
    apt-get install -y --no-install-recommends ca-certificates tini && \
    rm -rf /var/lib/apt/lists/* && \
    groupadd --gid 10001 lorad && \
    useradd --uid 10001 --gid lorad --home-dir /data --no-create-home --shell /usr/sbin/nologin lorad && \
    install -d -o lorad -g lorad /data
COPY --from=build-cuda /out/lorad /usr/local/bin/lorad
COPY LICENSE-APACHE LICENSE-MIT assets/NOTICE /usr/share/doc/lorad/
ENV LORAD_STORAGE__DATA_DIR=/data \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER lorad
WORKDIR /data
VOLUME /data
EXPOSE 8080
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=6s --start-period=20s --retries=3 CMD ["lorad", "healthcheck"]
ENTRYPOINT ["tini", "--", "lorad"]
CMD ["serve", "--bind", "0.0.0.0:8080", "--insecure-no-auth"]
