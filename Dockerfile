# distmoe and all it needs, for CPUs and GPUs: torch's wheel brings the CUDA libraries, the host brings the driver.
#
#   docker build --tag distmoe .
#   docker run --rm distmoe train configs/smoke.yaml               what follows the image goes to python -m distmoe
#   docker run --rm --entrypoint torchrun distmoe --nproc-per-node 2 -m distmoe train configs/smoke.yaml
#
# launch/docker.sh does both with the flags that training needs: shared memory, GPUs, folders for data and runs.
# A package index or mirror of your own: --secret id=pip.conf,src=FILE. pip reads the file while it installs; it stays
# out of the image, and so does every password in it.

# Any Debian 12 or Ubuntu 24.04, plain or NVIDIA's, or an image with Python 3.11 or 3.12 of its own.
ARG BASE_IMAGE=debian:bookworm-slim
FROM ${BASE_IMAGE}

WORKDIR /opt/distmoe

# System packages, by launch/setup.sh alone: it also knows what FFCV's build needs on other bases.
ARG DISTMOE_EXTRAS=ffcv,deepspeed,dev,peers
COPY launch/setup.sh launch/
RUN bash launch/setup.sh system-packages && rm -rf /var/lib/apt/lists/*

# The user that everything else belongs to. A container may run as any other (docker run --user): the two folders are
# open like /tmp, so that caches, runs and data find room. NVIDIA's Ubuntu has a user 1000 already: ids may be shared.
ARG UID=1000
ARG GID=1000
RUN groupadd --non-unique --gid "${GID}" distmoe \
    && useradd --non-unique --uid "${UID}" --gid "${GID}" --no-log-init --shell /bin/bash distmoe \
    && install -d -m 1777 -o "${UID}" -g "${GID}" /opt/distmoe /home/distmoe /home/distmoe/.cache
USER ${UID}:${GID}
# USER names whoever it is to Python's getpass, which otherwise fails for an id without an entry in /etc/passwd.
ENV HOME=/home/distmoe \
    USER=distmoe \
    LANG=C.UTF-8 \
    PATH=/opt/distmoe/.venv/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# Python packages, before the sources: an editable install of an empty package is filled by the copy below, so that a
# change of the sources does not install anything again. The cache keeps downloads on the builder, not in the image.
ARG DISTMOE_TORCH_INDEX_URL=
COPY --chown=${UID}:${GID} pyproject.toml ./
COPY --chown=${UID}:${GID} launch/constraints.txt launch/
RUN --mount=type=cache,id=distmoe-pip,target=/var/cache/pip,mode=0777 \
    --mount=type=secret,id=pip.conf,target=/etc/pip.conf,mode=0444 \
    mkdir distmoe && touch distmoe/__init__.py README.md LICENSE \
    && PIP_CACHE_DIR=/var/cache/pip bash launch/setup.sh

COPY --chown=${UID}:${GID} . .
# The set-up must find nothing left to do. Bytecode is made here: later users may not write beside the sources.
RUN bash launch/setup.sh && python -m compileall -q distmoe && install -d -m 1777 runs .data

LABEL org.opencontainers.image.title="distmoe" \
      org.opencontainers.image.description="Trains Mixture-of-Experts image classifiers" \
      org.opencontainers.image.licenses="Apache-2.0"

ENTRYPOINT ["/opt/distmoe/.venv/bin/python", "-m", "distmoe"]
CMD ["--help"]
