#!/bin/sh
# Copy a folder, then hash the copy with coreutils.
set -e
cp -r "$1" "$2"
sha256sum "$2"/*
