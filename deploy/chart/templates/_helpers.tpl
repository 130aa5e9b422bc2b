{{- define "meshca.image" -}}
{{ .root.Values.image.registry }}/{{ .name }}:{{ .root.Values.image.tag | default .root.Chart.AppVersion }}
{{- end }}

{{- define "meshca.labels" -}}
app.kubernetes.io/name: meshca
app.kubernetes.io/component: {{ .component }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
{{- end }}

{{- /* Some clusters admit pods of a system priority only where a quota says so. */}}
{{- define "meshca.priorityQuota" -}}
apiVersion: v1
kind: ResourceQuota
metadata:
  name: meshca-priority
  namespace: {{ .namespace }}
  labels: {{- include "meshca.labels" (dict "root" .root "component" .component) | nindent 4 }}
spec:
  hard: {pods: "1000000"}
  scopeSelector:
    matchExpressions:
    - {scopeName: PriorityClass, operator: In, values: [{{ .class }}]}
{{- end }}

{{/* What makes an object part of the check before "helm uninstall"; given its place in the order. */}}
{{- define "meshca.uninstallHook" -}}
helm.sh/hook: pre-delete
helm.sh/hook-weight: {{ . | quote }}
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
