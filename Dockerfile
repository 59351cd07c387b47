# One file for every image:
#   docker build .                                                   torch as the index ships it (CUDA on x86-64)
#   docker build --build-arg TORCH="torch==2.13.0+cpu --index-url …" .   the CPU build of torch, much smaller
#   docker build --build-arg BASE_IMAGE=… .                          another Python 3.11, such as a mirror's
# Needs no BuildKit: GitHub's runner builds with whatever builder its host has.
ARG BASE_IMAGE=python:3.11-slim-bookworm
FROM ${BASE_IMAGE}

# Arguments of `pip install`, so that an index can be named too.
ARG TORCH="torch==2.13.0"

# The NVIDIA runtime looks at the first two; without a GPU they mean nothing.
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_DISABLE_TELEMETRY=1

LABEL org.opencontainers.image.title="lora-merge-action" \
      org.opencontainers.image.description="Merge a LoRA adapter into its base model, prove the merge, publish it under a tag." \
      org.opencontainers.image.licenses="Apache-2.0"

WORKDIR /app

# The largest and least often changed layer first, the code last.
# hadolint ignore=SC2086,DL3013
RUN pip install --no-cache-dir ${TORCH}
COPY requirements.lock ./
RUN pip install --no-cache-dir --require-hashes --no-deps -r requirements.lock
COPY LICENSE cleanup.py entrypoint.py ./
COPY runner ./runner
RUN python -m compileall -q /app

# Where GitHub's runner mounts the workspace; `docker run -v "$PWD:/github/workspace"` does the same by hand.
WORKDIR /github/workspace

# By path, without a shell: sh drops variables with a hyphen, and every INPUT_ has one. No USER: the runner needs root.
ENTRYPOINT ["/app/entrypoint.py"]
