-- The pods of a session, for who asks what they are like now.
-- depends: 0007.charts

CREATE INDEX cluster_objects_pods_idx ON cluster_objects (session_id) WHERE kind = 'pod';
