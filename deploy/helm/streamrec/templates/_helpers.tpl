{{- define "streamrec.name" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name }}{{ else }}{{ .Release.Name }}-{{ .Chart.Name }}{{ end }}
{{- end }}

{{- define "streamrec.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: worker
{{- end }}

{{- define "streamrec.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
{{- end }}

{{- define "streamrec.workerLabels" -}}
{{ include "streamrec.labels" . }}
app.kubernetes.io/component: worker
{{- end }}

{{/* repository:tag or repository@digest; takes the image and the chart's appVersion. */}}
{{- define "streamrec.image" -}}
{{- $image := index . 0 -}}
{{- if $image.digest }}{{ $image.repository }}@{{ $image.digest }}{{ else }}{{ $image.repository }}:{{ $image.tag | default (index . 1) }}{{ end }}
{{- end }}

{{- define "streamrec.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ .Values.serviceAccount.name | default (include "streamrec.name" .) }}{{ else }}{{ .Values.serviceAccount.name | default "default" }}{{ end }}
{{- end }}

{{- define "streamrec.registryClaim" -}}
{{- .Values.models.registry.pvc.existingClaim | default (printf "%s-models" (include "streamrec.name" .)) }}
{{- end }}

{{- define "streamrec.registry" -}}
{{- $registry := .Values.models.registry -}}
{{- if eq $registry.type "url" }}{{ required "models.registry.url is wanted where models.registry.type is url" $registry.url }}
{{- else if eq $registry.type "pvc" }}/registry
{{- else }}/srv/models{{ end }}
{{- end }}

{{/* More pods than partitions would idle. */}}
{{- define "streamrec.maxReplicas" -}}
{{- $partitions := int .Values.kafka.partitions -}}
{{- $most := int (.Values.autoscaling.maxReplicas | default $partitions) -}}
{{- if gt $most $partitions }}{{ fail (printf "autoscaling.maxReplicas (%d) is more than kafka.partitions (%d): a partition is read by one pod, so the others would idle" $most $partitions) }}{{ end -}}
{{- if lt $most (int .Values.autoscaling.minReplicas) }}{{ fail (printf "autoscaling.minReplicas (%d) is more than the largest number of pods (%d)" (int .Values.autoscaling.minReplicas) $most) }}{{ end -}}
{{ $most }}
{{- end }}

{{- define "streamrec.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "streamrec.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* The settings that commands and workers share, from the config map and by reference. */}}
{{- define "streamrec.envFrom" -}}
- configMapRef:
    name: {{ include "streamrec.name" . }}
{{- with .Values.models.registry.credentialsSecret }}
- secretRef:
    name: {{ . }}
{{- end }}
{{- with .Values.extraEnvFrom }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* What the settings' *_FILE variables name, from the secrets that the values name. */}}
{{- define "streamrec.secretSources" -}}
{{- $kafka := .Values.kafka.security }}
{{- $redis := .Values.redis }}
{{- range list
  (list $kafka.passwordSecret $kafka.passwordKey "kafka/password")
  (list $kafka.caSecret $kafka.caKey "kafka/ca.crt")
  (list $kafka.certificateSecret $kafka.certificateKey "kafka/tls.crt")
  (list $kafka.certificateSecret $kafka.privateKeyKey "kafka/tls.key")
  (list $kafka.oauth.clientSecret $kafka.oauth.clientSecretKey "kafka/client-secret")
  (list $redis.existingSecret $redis.secretKey "redis/url")
  (list $redis.passwordSecret $redis.passwordKey "redis/password")
  (list $redis.caSecret $redis.caKey "redis/ca.crt")
  (list .Values.logSaltSecret .Values.logSaltKey "log/salt")
}}
{{- if index . 0 }}
- secret:
    name: {{ index . 0 }}
    items:
      - {key: {{ index . 1 }}, path: {{ index . 2 }}}
{{- end }}
{{- end }}
{{- end }}
