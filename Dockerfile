# syntax=docker/dockerfile:1
# docker build -t livereel:cpu .                            for `mini`
# docker build -t livereel:cuda --build-arg DEVICE=cuda .   for an NVIDIA GPU
ARG PYTHON=3.11
FROM python:${PYTHON}-slim-bookworm AS build
ARG DEVICE=cpu
ARG TORCH=2.13.0
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/livereel
# torch is most of the image and changes least, so it is the first layer. PyPI's Linux build is the one with CUDA.
RUN case "$DEVICE" in \
        cpu) index=https://download.pytorch.org/whl/cpu ;; \
        cuda) index=https://pypi.org/simple ;; \
        *) echo "DEVICE must be cpu or cuda, not '$DEVICE'" >&2; exit 1 ;; \
    esac \
    && /opt/livereel/bin/pip install --index-url "$index" "torch==$TORCH"
WORKDIR /build
COPY pyproject.toml README.md LICENSE ./
RUN /opt/livereel/bin/pip install '.[engine,otel]'

FROM python:${PYTHON}-slim-bookworm AS base-cpu

# Triton compiles kernels at run time and needs a C compiler for their launchers.
FROM python:${PYTHON}-slim-bookworm AS base-cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility

ARG DEVICE=cpu
FROM base-${DEVICE}
RUN useradd --uid 10001 --create-home --home-dir /home/livereel --shell /usr/sbin/nologin livereel \
    && install --directory --owner=livereel --group=livereel --mode=0700 /var/cache/livereel /var/lib/livereel
COPY --from=build /opt/livereel /opt/livereel
WORKDIR /app
COPY engine ./engine
COPY server ./server
COPY clients/web ./clients/web
COPY clients/overlay ./clients/overlay
COPY clients/js ./clients/js
ENV PATH=/opt/livereel/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 \
    TRITON_CACHE_DIR=/var/cache/livereel/triton \
    TORCHINDUCTOR_CACHE_DIR=/var/cache/livereel/inductor \
    LIVEREEL_HOST=0.0.0.0 \
    LIVEREEL_PORT=8000 \
    LIVEREEL_DATA=/var/lib/livereel/data \
    LIVEREEL_WEIGHTS=/var/lib/livereel/weights \
    LIVEREEL_KEYS=/run/secrets/livereel-keys \
    LIVEREEL_LOG=json
USER 10001:10001
VOLUME ["/var/cache/livereel", "/var/lib/livereel"]
EXPOSE 8000
# /readyz answers 503 until the engine is up; large weights take minutes to load.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"LIVEREEL_PORT\"]}/readyz', timeout=4)"]
ENTRYPOINT ["python", "-m", "server"]
