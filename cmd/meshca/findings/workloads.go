package findings

// workloads are what "meshca status" finds.
var workloads = []Page{
	{Code: "refused", Title: "the CA refuses a workload a certificate",
		Means: "Its token was good in itself, and something about it does not hold: the pod is gone or has finished, its ServiceAccount or node is another one, or the CSR asks for what nobody gets. The reason is beside the finding, in an event of the pod (CertificateRefused) and in the CA's log. What the workload has stays valid to its end. A refusal that is not repeated for 10 min counts no more.",
		Do:    "mend what the reason names; the agent tries again by itself, at most 5 min later."},
	{Code: "ending_soon", Title: "a certificate was not renewed when it should",
		Means: "Agents renew between a third and a half of a certificate's life. Three quarters of this one's are over, and nobody has asked for the next. In its last 5 min the workload counts as failing.",
		Do:    "look whether the agent reaches the CA (port 15012) and has a token: its log says what it tries. If \"refused\" stands beside it, mend that."},
	{Code: "refusing", Title: "an agent refuses what the CA sends",
		Means: "A bundle or a policy came that the agent may not take: of another trust domain, empty, older than what it holds, or other content under the same number. It keeps what it has. The agent's words are beside the finding.",
		Do:    "where the words speak of an older version, a replica of the CA is behind: \"meshca status\" names it. After a restore of a backup, restore with --as-newest."},
	{Code: "bundle_behind", Title: "the last trust bundle is not acknowledged",
		Means: "The bundle was sent more than 10 s ago and the agent has not answered. A rotation of the root waits for this workload.",
		Do:    "look at the agent on the workload's node: it hangs, or its connection is half open and ends within 80 s by itself."},
	{Code: "policy_behind", Title: "the last policy is not acknowledged",
		Means: "The resolved policy was sent more than 10 s ago and the agent has not answered. The workload goes by the one before.",
		Do:    "as for bundle_behind."},
	{Code: "disconnected", Title: "no stream shows a workload",
		Means: "The pod mounts the volume, and for 20 s no agent's stream at any replica has named it: the agent of its node is away, cannot reach the CA, or has not been asked by the kubelet to mount the volume. The certificate it has is good to its end; bundles and policies do not reach it.",
		Do:    "\"meshca explain pod NAMESPACE/NAME\" looks at the agent, the volume and the events."},
	{Code: "unknown", Title: "a workload cannot be told",
		Means: "A replica knows more workloads than fit into its report (200 KiB), or than it remembers (50,000), and this pod may be one of them.",
		Do:    "mend the findings that are listed first: they take most of the room. More replicas share the workloads."},
}
