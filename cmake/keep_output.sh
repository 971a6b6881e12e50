#!/bin/sh
# Compiler launcher: runs the command and keeps what it prints beside the object, in <object>.log,
# where tools/check_kernels.py reads what ptxas said.
object=
previous=
for argument in "$@"; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
"$@" >"$object.log" 2>&1
status=$?
cat "$object.log"
exit $status
