"""What `coterie bench` does: ours and its peers on the same work, in the same run."""
