# sftmix and all that it needs, for clusters that run containers (docs/howto/container.md).
#
#   docker build -t sftmix .
#   docker run --rm --gpus all --ipc host -v "$PWD":/work sftmix run my.yaml
#
# BASE: an image with Python 3.11 or newer; one with a CUDA compiler where DeepSpeed is to build
# kernels of its own (offload). CONSTRAINTS: constraints-cpu.txt for machines without a GPU.
ARG BASE=python:3.12-slim
# hadolint ignore=DL3006
FROM ${BASE}
ARG CONSTRAINTS=
ARG EXTRAS=lora,eval

# a C++ compiler for DeepSpeed and triton; ssh and pdsh for launches over several hosts
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends \
        build-essential git iproute2 openssh-client pdsh \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/sftmix
COPY . .
# hadolint ignore=SC2086,DL3013
RUN python3 -m pip install --no-cache-dir ${CONSTRAINTS:+-c $CONSTRAINTS} ".[$EXTRAS]"

# runs, caches and data are mounted here
WORKDIR /work
ENTRYPOINT ["sftmix"]
CMD ["--help"]
