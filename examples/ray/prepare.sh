#!/bin/bash
# Embed, balance and cluster on the Ray cluster that this is submitted to.
#
#     ray job submit --address http://HEAD:8265 --working-dir . -- bash examples/ray/prepare.sh RECIPE
#
# Submit it again after a failure: finished stages answer at once, the others go on where they stopped.
set -euo pipefail

recipe=$1
for stage in embed balance cluster; do
    distilclip "$stage" "$recipe" --engine ray --engine-address auto
done
