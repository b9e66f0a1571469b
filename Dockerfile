# distilclip with PyTorch, to train and to work on a Ray cluster; with `--target light`, the core without PyTorch.
#
#     docker build -t distilclip .
#     docker run --gpus all --shm-size=8g -v "$PWD:/work" distilclip train recipe.toml
#
# PyTorch comes from pip's own index, with CUDA. For machines without a GPU, give the address of PyTorch's CPU index:
#     docker build --build-arg TORCH_INDEX=ADDRESS -t distilclip:cpu .
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS light
RUN useradd --create-home distilclip
WORKDIR /home/distilclip
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src src
COPY recipes recipes
RUN pip install --no-cache-dir --constraint constraints.txt .
USER distilclip
WORKDIR /work
ENTRYPOINT ["distilclip"]
CMD ["--help"]

FROM light AS full
ARG EXTRAS=train,ray,s3
ARG TORCH_INDEX=
USER root
WORKDIR /home/distilclip
# From its own index PyTorch has another version string (+cpu), which the constraints do not name.
RUN if [ -n "$TORCH_INDEX" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX" torch torchvision \
        && sed -i -E '/^(torch|torchvision)==/d' constraints.txt; fi \
    && pip install --no-cache-dir --constraint constraints.txt ".[$EXTRAS]"
COPY examples examples
USER distilclip
WORKDIR /work
