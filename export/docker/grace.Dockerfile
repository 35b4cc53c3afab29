# GRACE's own server, serving the export at /model (awq or qat), on a CPU or an NVIDIA GPU.
#
#   docker build -f export/docker/grace.Dockerfile -t grace-cpu .
#   docker build -f export/docker/grace.Dockerfile --build-arg TORCH_INDEX=https://pypi.org/simple -t grace-gpu .
#   docker run -p 127.0.0.1:8000:8000 -v /path/to/export:/model:ro grace-cpu          # --gpus all grace-gpu
#
# The context is the root of the repository. GRACE_API_KEY, if set, is what clients must present.
FROM python:3.11.11-slim-bookworm

# Where torch's CPU build is, which pip prefers to PyPI's own for CUDA.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1

# Triton compiles its kernels when they are first used.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY constraints.txt ./
RUN pip install --constraint constraints.txt --extra-index-url "$TORCH_INDEX" torch
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY data ./data
COPY recipes ./recipes
COPY grace ./grace
RUN pip install --constraint constraints.txt '.[serve]' \
    && useradd --create-home --uid 10001 serve
USER 10001
WORKDIR /home/serve
# Nothing is fetched: the model is complete, its tokenizer included.
ENV HF_HUB_OFFLINE=1

EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=180s --retries=4 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["grace", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
CMD ["--served-model-name", "grace"]
