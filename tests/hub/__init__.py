"""A local Hub: a server on a loopback socket that the unmodified huggingface_hub client can publish to.

Covered: whoami, create, delete, info, auth-check, card validation, preupload, LFS (basic and multipart), commits with
`parentCommit`, tags, branches, refs, trees, resolve with redirects to another host and ranges; accounts with read,
write and fine-grained tokens; rate limits; faults by rule (`tests.hub.faults`), resets of the connection included.
The Xet storage: tokens, chunk queries, xorbs, shards (streamed or not), reconstructions of files and ranges, reads of
several ranges; a server can also be without Xet.
Pull requests on `refs/pr/N`, discussions, merges, history, protected references, copies without sending.
Gated and private repositories, access requests, storage limits, tokens that expire.
Trusted publishers, with an identity provider that signs for them (`tests.hub.identity`).
Not covered: datasets, spaces, renames; uploads of xorbs by grants (clients fall back).

Sources: the huggingface_hub 2.4.0 and hf_xet 1.8.0 clients (what is sent, what is read), the Hub's documentation of
git, LFS and tokens, the Xet specification.
"""
