"""The edge: REST, WebSocket and pages. Holds no state that another replica does not have too."""
