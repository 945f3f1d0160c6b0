# Train and evaluate in a container; the user in it has your number, so that what it writes is yours:
#
#     docker build --build-arg UID=$(id -u) --tag enact .
#     docker run --rm --gpus all --shm-size 8g --volume $PWD/outputs:/enact/outputs enact python main.py --model detr --enact
#
# PyTorch brings its own CUDA libraries; the base gives the driver's interface, and its version is that of PyTorch's.
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ARG UID=1000
RUN userdel --remove ubuntu \
    && useradd --create-home --no-log-init --uid "$UID" enact \
    && install --directory --owner enact /enact /enact/outputs \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

WORKDIR /enact
COPY requirements.txt .
RUN pip install --no-cache-dir "torch==2.*" "torchvision==0.*" "numpy==2.*" --requirement requirements.txt
COPY --chown=enact . .
USER $UID
CMD ["python", "main.py", "--model", "detr", "--enact"]
