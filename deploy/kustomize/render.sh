#!/bin/sh
# Write the manifests beside this file from the Helm chart, or below the directory $1. Needs helm.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-$here}

render() { # FILE TEMPLATES... -- ARGUMENTS...
  file=$out/$1
  shift
  only=
  while [ "$1" != -- ]; do
    only="$only --show-only templates/$1.yaml"
    shift
  done
  shift
  mkdir -p "$(dirname "$file")"
  # $only is split into words on purpose.
  # shellcheck disable=SC2086
  {
    echo "# Made from deploy/helm by \`make manifests\`: change the chart instead."
    helm template streamrec "$here/../helm/streamrec" --kube-version 1.31.0 $only "$@"
  } >"$file"
}

render base/streamrec.yaml serviceaccount configmap service statefulset poddisruptionbudget networkpolicy --
render components/hpa/hpa.yaml autoscaling -- --set autoscaling.type=hpa
render components/keda/keda.yaml autoscaling -- --set autoscaling.type=keda
render components/monitoring/monitoring.yaml monitoring -- \
  --set serviceMonitor.enabled=true --set prometheusRule.enabled=true
render components/strimzi/strimzi.yaml strimzi -- --set strimzi.enabled=true
