"""What happens in Kubernetes clusters, told to browsers and to the sessions' rows, by one leader a cluster."""
