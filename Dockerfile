# The demo in a container, for http://127.0.0.1:7860:
#
#   docker build -t dinoseg .
#   docker run -p 7860:7860 -v "$PWD/outputs:/app/outputs:ro" dinoseg
#
# With an NVIDIA GPU (and its container toolkit):
#
#   docker build -t dinoseg-cuda --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 .
#   docker run --gpus all -p 7860:7860 -v "$PWD/outputs:/app/outputs:ro" dinoseg-cuda
#
# Flags of demo.py follow the name of the image; the model is outputs/best_model_iou.pth unless --model names another.
ARG BASE=debian:bookworm-slim
FROM ${BASE}

# libgl1 and libglib2.0-0 are what opencv-python loads
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3 python3-venv libgl1 libglib2.0-0 \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /venv

WORKDIR /app
COPY requirements.txt .
RUN /venv/bin/pip install --no-cache-dir -r requirements.txt "gradio>=6"
COPY . .

RUN useradd --create-home user
USER user
ENV PATH="/venv/bin:$PATH"
EXPOSE 7860
ENTRYPOINT ["python", "demo.py", "--host", "0.0.0.0"]
