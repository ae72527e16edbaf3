DROP INDEX cluster_objects_pods_idx;
