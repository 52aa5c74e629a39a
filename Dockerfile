# Everything that the two commands, training and sampling need, on a CPU or, with `docker run --gpus all`, on GPUs:
#   docker build -t mdt . && docker run --rm -v "$PWD/output_demo:/mdt/output_demo" mdt
FROM python:3.12-slim
# g++ is what torch.compile and Triton build with. Debian keeps one version of each, so none is pinned.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends g++ make procps && rm -rf /var/lib/apt/lists/*
WORKDIR /mdt
COPY . .
RUN make .venv/installed
ENV PATH=/mdt/.venv/bin:$PATH
CMD ["make", "demo"]
