#!/bin/sh
# Installs what a lock has into the image's environment: the Dockerfile's targets differ in the lock.
# Takes the symbols out of four large libraries, which need none to run: 161 MB.
set -eu
/opt/pip/bin/pip --python /opt/aqt/bin/python install --require-hashes -r "$1"
find /opt/aqt/lib \( -name libjax_common.so -o -name '_tensorstore.*.so' \
    -o -name '_ml_dtypes_ext.*.so' -o -path '*/uvloop/loop.*.so' \) -exec strip --strip-unneeded {} +
