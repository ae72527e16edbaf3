DROP TABLE cluster_objects;
