DROP TABLE hook_deliveries;
DROP TABLE deployment_logs;
DROP TABLE deployments;
DROP TABLE apps;
DROP FUNCTION notify_deployments();
