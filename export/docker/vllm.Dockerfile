# vLLM on an NVIDIA GPU, serving the export at /model (awq or compressed-tensors).
#
#   docker build -f export/docker/vllm.Dockerfile -t grace-vllm export/docker
#   docker run --gpus all --ipc host -p 127.0.0.1:8000:8000 -v /path/to/export:/model:ro grace-vllm
#
# VLLM_API_KEY, if set, is what clients must present.
FROM vllm/vllm-openai:v0.33.0

RUN useradd --create-home --uid 10001 serve
USER 10001
WORKDIR /home/serve
# Nothing is fetched: the model is complete, its tokenizer included.
ENV HF_HUB_OFFLINE=1 VLLM_MEDIA_URL_ALLOW_REDIRECTS=0 VLLM_NO_USAGE_STATS=1 VLLM_CACHE_ROOT=/home/serve/.cache/vllm

EXPOSE 8000
# Loading and warming up take minutes.
HEALTHCHECK --interval=15s --timeout=5s --start-period=600s --retries=4 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["vllm", "serve", "/model", "--host", "0.0.0.0", "--port", "8000"]
# No domain is called so: requests may not make the server fetch anything.
CMD ["--served-model-name", "grace", "--max-model-len", "4096", "--allowed-media-domains", "none.invalid"]
