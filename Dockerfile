# An image that holds the toolkit: it packs programs, and runs what was packed.
#
#     docker build -t bigmachine .
#     docker run --rm -v "$PWD":/work bigmachine pack app.py
#     docker run --rm -v "$PWD":/work --init --entrypoint ./app.pex bigmachine
#
# Programs are packed for this image's Python, unless --python says otherwise; another one's image:
#
#     docker build -t bigmachine:3.13 --build-arg BASE=python:3.13.9-slim-bookworm .
#
# Where the user's own id on the host is not 1000: docker run --user "$(id -u):$(id -g)" ….
# To keep the cache from one container to the next, of the same user: -v bigmachine-cache:/var/cache/bigmachine.
ARG BASE=python:3.12.12-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
RUN python3 -m venv /opt/bigmachine
COPY pyproject.toml README.md LICENSE ./
COPY bigmachine bigmachine
RUN /opt/bigmachine/bin/pip install --no-cache-dir --disable-pip-version-check .

FROM ${BASE}
LABEL org.opencontainers.image.title="bigmachine" \
      org.opencontainers.image.description="One Python program becomes a cluster: the toolkit that packs it" \
      org.opencontainers.image.licenses="Apache-2.0"
# Whoever runs the container may write the cache, whatever their id is.
RUN useradd --create-home --uid 1000 bigmachine \
    && install --directory --mode 1777 /var/cache/bigmachine \
    && install --directory --owner bigmachine --group bigmachine /work
COPY --from=build /opt/bigmachine /opt/bigmachine
ENV PATH=/opt/bigmachine/bin:$PATH \
    BIGMACHINE_CACHE=/var/cache/bigmachine/toolkit \
    PEX_ROOT=/var/cache/bigmachine/pex \
    SHIV_ROOT=/var/cache/bigmachine/shiv
VOLUME /var/cache/bigmachine
USER 1000:1000
WORKDIR /work
ENTRYPOINT ["bigmachine"]
CMD ["--help"]
