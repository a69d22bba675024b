"""The process that talks to a Ray cluster, and what runs on the cluster's hosts."""
