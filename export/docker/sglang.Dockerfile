# SGLang on an NVIDIA GPU, serving the export at /model (awq or compressed-tensors).
#
#   docker build -f export/docker/sglang.Dockerfile -t grace-sglang export/docker
#   docker run --gpus all --ipc host -p 127.0.0.1:8000:8000 -v /path/to/export:/model:ro grace-sglang
FROM lmsysorg/sglang:v0.5.23

RUN useradd --create-home --uid 10001 serve
USER 10001
WORKDIR /home/serve
# Nothing is fetched: the model is complete, its tokenizer included.
ENV HF_HUB_OFFLINE=1

EXPOSE 8000
# Loading and warming up take minutes.
HEALTHCHECK --interval=15s --timeout=5s --start-period=600s --retries=4 \
    CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["python3", "-m", "sglang.launch_server", "--model-path", "/model", "--host", "0.0.0.0", "--port", "8000"]
# Its AWQ kernels multiply fp16 only.
CMD ["--dtype", "float16", "--served-model-name", "grace", "--context-length", "4096"]
