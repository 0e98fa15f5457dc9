//! Images, instance disks and volumes of one host: the process `trine storage`.
//!
//! It keeps images by the hash of their content, makes instance disks and config drives, is the
//! only gate of the volumes whose home this host is (one writer each, by generation), exports
//! images and volumes to the other hosts over NBD inside mutual TLS, and terminates the exports of
//! other hosts for the guests of this one.
//!
//! It must never decide where anything is placed, open a path that a client chose, answer before
//! what it promises is on disk, or let a second writer at a volume.
//!
//! Start reading at [`control`] (what it is asked), then `volumes` (the gate), then `nbd`.
#![forbid(unsafe_code)]

pub mod client;
pub mod config_drive;
pub mod control;
mod directory;
mod fetch;
mod image;
mod images;
mod instances;
mod nbd;
mod remote;
mod server;
mod service;
mod volumes;

pub use client::Client;
pub use control::{Error, ErrorKind};
pub use directory::hand_to_cluster;
pub use nbd::tls::TlsError;
pub use service::{Service, StartError, run};

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// What a storage process is started with.
#[derive(Clone, Debug)]
pub struct StorageConfig {
    /// Unix socket to bind for control, mode 0600.
    pub control: PathBuf,
    /// The directory that this process owns; made where missing, locked while it runs.
    pub directory: PathBuf,
    /// Address for the other hosts (NBD inside TLS); never a wildcard.
    pub listen: SocketAddr,
    /// This host's identity and the authority that the other hosts' must come from.
    pub tls: Tls,
    /// The cluster's id in hex, as it stands in certificate names `node-<id>.<cluster id>.trine`.
    pub cluster_id: String,
}

/// A host's certificate, its key and the cluster's authority, each as PEM.
#[derive(Clone)]
pub struct Tls {
    /// The cluster's authority.
    pub ca_pem: String,
    /// This host's certificate (and intermediates, if any), named `node-<id>.<cluster id>.trine`.
    pub cert_pem: String,
    /// The certificate's private key.
    pub key_pem: String,
}

impl Tls {
    /// Reads the three PEM files.
    pub fn from_files(ca: &Path, cert: &Path, key: &Path) -> Result<Self, StartError> {
        let read = |path: &Path| {
            std::fs::read_to_string(path)
                .map_err(|source| StartError::ReadPem { path: path.to_owned(), source })
        };
        Ok(Self { ca_pem: read(ca)?, cert_pem: read(cert)?, key_pem: read(key)? })
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").finish_non_exhaustive()
    }
}
