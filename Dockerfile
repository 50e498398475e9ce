# The base brings the interface to the driver; the torch wheel brings its own CUDA libraries.
#
#   docker build -t lit-unlearn .
#   docker run --rm --gpus all -v "$PWD:/workspace" -e HOME=/workspace --user "$(id -u):$(id -g)" \
#       lit-unlearn fit --config null_space.yaml --concept dog
#
# Without --gpus it runs on the processor.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends make python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# The dependencies are a layer of their own: a change of the code does not install them again.
WORKDIR /opt/lit-unlearn
COPY Makefile pyproject.toml constraints.txt README.md LICENSE NOTICE ./
COPY lit_unlearn/__init__.py lit_unlearn/
RUN make install EXTRAS=
COPY . .

RUN useradd --create-home unlearn \
    && mkdir /workspace \
    && chown unlearn:unlearn /workspace
USER unlearn
WORKDIR /workspace
ENV PATH=/opt/lit-unlearn/.venv/bin:$PATH

ENTRYPOINT ["lit-unlearn"]
CMD ["--help"]
