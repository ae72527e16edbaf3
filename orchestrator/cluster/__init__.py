"""One Kubernetes cluster, as its API shows it: reached, watched, and changed through Helm."""
