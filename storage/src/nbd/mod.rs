//! NBD between hosts: the fixed newstyle handshake, mutual TLS by `NBD_OPT_STARTTLS` before any
//! export, simple replies. Source: the NBD protocol document (`proto.md` of the NBD project).
//!
//! - [`wire`]: the protocol's bytes, pure;
//! - [`tls`]: who may connect to whom;
//! - [`server`]: negotiates what another host opens here, [`export`] is what it opened and
//!   [`transmission`] carries its requests;
//! - [`client`]: a connection to another host, up to the end of its handshake.

pub(crate) mod client;
pub(crate) mod export;
pub(crate) mod server;
pub(crate) mod tls;
pub(crate) mod transmission;
pub(crate) mod wire;

use tokio::io::{AsyncRead, AsyncWrite};

/// A byte stream to a peer, before or inside TLS.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}
