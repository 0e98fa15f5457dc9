#![allow(dead_code)] // Each test file uses its part.
//! Hosts for tests: storage services with directories, identities and control sockets of their
//! own, and a small NBD client for the socket that a guest's process gets.

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use storage::control::{Attachment, ImageInfo, Peer};
use storage::{Client, Error, ErrorKind, Service, StorageConfig, Tls};
use tempfile::TempDir;

pub(crate) const CLUSTER: &str = "0123456789abcdef";

/// A cluster's authority.
pub(crate) struct Authority {
    certificate_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().unwrap();
        let certificate_pem = params.self_signed(&key).unwrap().pem();
        Self { certificate_pem, issuer: Issuer::new(params, key) }
    }

    pub(crate) fn identity(&self, name: &str) -> Tls {
        let mut params =
            CertificateParams::new(vec![name.to_owned(), "127.0.0.1".to_owned()]).unwrap();
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.issuer).unwrap();
        Tls {
            ca_pem: self.certificate_pem.clone(),
            cert_pem: certificate.pem(),
            key_pem: key.serialize_pem(),
        }
    }
}

/// One host: its service can be stopped and started over the same directory.
pub(crate) struct Host {
    pub(crate) place: TempDir,
    name: String,
    tls: Tls,
    service: Option<Service>,
}

impl Host {
    pub(crate) fn start(authority: &Authority, id: u32) -> Self {
        Self::start_as(authority, format!("node-{id}.{CLUSTER}.trine"))
    }

    pub(crate) fn start_as(authority: &Authority, name: String) -> Self {
        let place = tempfile::tempdir().unwrap();
        let tls = authority.identity(&name);
        let mut host = Self { place, name, tls, service: None };
        host.restart();
        host
    }

    pub(crate) fn config(&self) -> StorageConfig {
        StorageConfig {
            control: self.place.path().join("control"),
            directory: self.directory(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            tls: self.tls.clone(),
            cluster_id: CLUSTER.to_owned(),
        }
    }

    pub(crate) fn restart(&mut self) {
        self.stop();
        self.service = Some(Service::start(self.config()).unwrap());
        // A status waits for the measurement at start, which uses the staging directory.
        self.client().status().unwrap();
    }

    pub(crate) fn stop(&mut self) {
        self.service = None;
    }

    pub(crate) fn directory(&self) -> PathBuf {
        self.place.path().join("storage")
    }

    pub(crate) fn client(&self) -> Client {
        Client::connect(&self.place.path().join("control")).unwrap()
    }

    pub(crate) fn peer(&self) -> Peer {
        let address = self.service.as_ref().unwrap().listen();
        Peer { address, server_name: self.name.clone() }
    }

    pub(crate) fn import(&self, content: &[u8]) -> Result<ImageInfo, Error> {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let content = content.to_vec();
        // A refused import closes its end early: that the rest can't be written is then no news.
        let writing = std::thread::spawn(move || {
            let _ = writer.write_all(&content);
        });
        let imported = self.client().import_image("image-1", "raw", 1 << 30, &reader);
        drop(reader);
        writing.join().unwrap();
        imported
    }

    /// Entries under one of the directory's folders.
    pub(crate) fn entries(&self, folder: &str) -> usize {
        std::fs::read_dir(self.directory().join(folder)).unwrap().count()
    }
}

pub(crate) fn attachment(volume_id: &str, server_id: &str, generation: u64) -> Attachment {
    Attachment {
        volume_id: volume_id.to_owned(),
        server_id: server_id.to_owned(),
        generation,
        read_only: false,
    }
}

pub(crate) fn kind<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorKind {
    result.unwrap_err().kind
}

/// Bytes in which no two blocks are alike.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

/// What a guest's process does with the socket of a connected volume.
pub(crate) struct Nbd {
    socket: UnixStream,
}

pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 1;
pub(crate) const FLUSH: u16 = 3;
pub(crate) const TRIM: u16 = 4;
pub(crate) const WRITE_ZEROES: u16 = 6;
pub(crate) const FUA: u16 = 1;

impl Nbd {
    pub(crate) fn new(descriptor: OwnedFd) -> Self {
        Self { socket: descriptor.into() }
    }

    pub(crate) fn send(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
    ) {
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend(flags.to_be_bytes());
        request.extend(command.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend(length.to_be_bytes());
        request.extend(payload);
        self.socket.write_all(&request).unwrap();
    }

    /// The error number of the next reply and its cookie (the offset).
    pub(crate) fn reply(&mut self) -> std::io::Result<(u32, u64)> {
        let mut reply = [0; 16];
        self.socket.read_exact(&mut reply)?;
        assert_eq!(reply[..4], 0x6744_6698u32.to_be_bytes());
        let error = u32::from_be_bytes(reply[4..8].try_into().unwrap());
        Ok((error, u64::from_be_bytes(reply[8..].try_into().unwrap())))
    }

    pub(crate) fn call(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        payload: &[u8],
        length: u32,
    ) -> u32 {
        self.send(command, flags, offset, length, payload);
        self.reply().unwrap().0
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        assert_eq!(self.call(WRITE, 0, offset, bytes, bytes.len() as u32), 0);
    }

    pub(crate) fn flush(&mut self) {
        assert_eq!(self.call(FLUSH, 0, 0, &[], 0), 0);
    }

    pub(crate) fn read(&mut self, offset: u64, length: u32) -> Vec<u8> {
        assert_eq!(self.call(READ, 0, offset, &[], length), 0);
        let mut bytes = vec![0; length as usize];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// Whether the home has closed the connection.
    pub(crate) fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        matches!(self.socket.read(&mut byte), Ok(0) | Err(_))
    }
}
