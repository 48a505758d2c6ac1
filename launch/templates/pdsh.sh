#!/bin/bash
# Run this on the first node of a cluster with ssh and pdsh. Made by `sftmix launch --template
# pdsh`. Exit codes: 0 all is published, 75 stopped on request and saved, anything else a failure.
set -eu
cd -- $folder

$python -m sftmix.cli doctor $doctor_arguments --hostfile $hostfile --quick
exec $python -m sftmix.cli launch $arguments --hostfile $hostfile --launcher pdsh
