# On a CPU:   docker build -t diffdistill .
# On a GPU:   docker build -t diffdistill --build-arg BASE=nvidia/cuda:12.8.1-base-ubuntu24.04 .
#             docker run --gpus all --user "$(id -u):$(id -g)" -v "$PWD":/runs diffdistill train dmd2/digits teacher=runs/teacher
# The torch of constraints.txt brings CUDA's libraries along on Linux; PIP_ARGS="--index-url ..." takes torch from elsewhere.
ARG BASE=python:3.11-slim
FROM ${BASE}
ARG EXTRAS=hf,eval
ARG PIP_ARGS=""
RUN command -v python3 > /dev/null && python3 -c 'import ensurepip, venv' 2> /dev/null || \
    { apt-get update && apt-get install -y --no-install-recommends python3 python3-venv && rm -rf /var/lib/apt/lists/*; }
RUN python3 -m venv /opt/diffdistill
ENV PATH=/opt/diffdistill/bin:$PATH HOME=/runs DIFFDISTILL_CACHE=/runs/.cache/diffdistill
# A name for users that the image does not know (--user): torch asks for one.
ENV USER=user
COPY . /tmp/source
RUN case ",${EXTRAS}," in *,play,*) cd /tmp/source && sed -i '/^pillow==/d' constraints.txt && cat constraints-play.txt >> constraints.txt ;; esac
RUN pip install --no-cache-dir --constraint /tmp/source/constraints.txt ${PIP_ARGS} "/tmp/source[${EXTRAS}]" \
    && rm -rf /tmp/source && diffdistill --version
RUN useradd --create-home --home-dir /runs --uid 10001 user
USER user
WORKDIR /runs
ENTRYPOINT ["diffdistill"]
CMD ["--help"]
