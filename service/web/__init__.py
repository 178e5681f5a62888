"""The clinician's pages: server-rendered, no inline script or style, nothing from another host."""
