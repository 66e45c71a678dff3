#!/bin/sh
exec sparseopt project run "$@"
