"""HTTP in, HTTP out: the web process. Knows no engine and no worker."""
