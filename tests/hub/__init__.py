"""A local Hub: a server on a loopback socket that the unmodified huggingface_hub client can publish to.

Covered: whoami, create, delete, info, auth-check, card validation, preupload, LFS (basic and multipart), commits with
`parentCommit`, tags, branches, refs, trees, resolve with redirects to another host and ranges; accounts with read,
write and fine-grained tokens; rate limits; faults by rule (`tests.hub.faults`), resets of the connection included.
Not covered: Xet (its token routes answer 404, so clients run with `HF_HUB_DISABLE_XET=1`), pull requests, datasets,
spaces, OIDC, renames.

Sources: the huggingface_hub 2.4.0 client (what is sent, what is read), the Hub's documentation of git, LFS and tokens.
"""
