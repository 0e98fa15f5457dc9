//! The blocking client of a storage process's control socket: one method for each request.

use crate::control::{
    Attachment, Envelope, Error, ErrorKind, ImageInfo, Peer, Reply, Request, Status, VERSION,
    VolumeInfo,
};
use base64::Engine as _;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// A connection to a storage process: one request at a time; make another for more.
#[derive(Debug)]
pub struct Client {
    socket: UnixStream,
}

/// A disk that a storage process handed over.
#[derive(Debug)]
pub struct Disk {
    /// A raw descriptor, or for a connected volume the socket.
    pub descriptor: OwnedFd,
    /// Its size.
    pub size_bytes: u64,
    /// For a connected volume its home's storage epoch, else 0.
    pub epoch: u64,
}

impl Client {
    /// Connects to the process whose control socket is at `path`.
    pub fn connect(path: &Path) -> Result<Self, Error> {
        let socket = UnixStream::connect(path).map_err(|error| {
            Error::unreachable(format!("connect to storage at {}: {error}", path.display()))
        })?;
        Ok(Self { socket })
    }

    /// What the process holds.
    pub fn status(&mut self) -> Result<Status, Error> {
        match self.call(Request::Status, &[])?.0 {
            Reply::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }

    /// Stores what is read from `content` (a pipe, a socket or a file) up to its end.
    pub fn import_image(
        &mut self,
        image_id: &str,
        disk_format: &str,
        size_limit_bytes: u64,
        content: impl AsFd,
    ) -> Result<ImageInfo, Error> {
        let request = Request::ImportImage {
            image_id: image_id.to_owned(),
            disk_format: disk_format.to_owned(),
            size_limit_bytes,
        };
        match self.call(request, &[content.as_fd()])?.0 {
            Reply::Imported(image) => Ok(*image),
            other => Err(unexpected(&other)),
        }
    }

    /// Brings an image from one of the hosts `from`, verified.
    pub fn fetch_image(
        &mut self,
        sha512: &str,
        size_bytes: u64,
        from: Vec<Peer>,
    ) -> Result<(), Error> {
        self.done(Request::FetchImage { sha512: sha512.to_owned(), size_bytes, from })
    }

    /// Whether the image is held.
    pub fn has_image(&mut self, sha512: &str) -> Result<bool, Error> {
        match self.call(Request::HasImage { sha512: sha512.to_owned() }, &[])?.0 {
            Reply::Held { held } => Ok(held),
            other => Err(unexpected(&other)),
        }
    }

    /// Removes an image.
    pub fn delete_image(&mut self, sha512: &str) -> Result<(), Error> {
        self.done(Request::DeleteImage { sha512: sha512.to_owned() })
    }

    /// A read-only descriptor of an image's content.
    pub fn read_image(&mut self, sha512: &str) -> Result<Disk, Error> {
        self.disk(Request::ReadImage { sha512: sha512.to_owned() })
    }

    /// Makes a server's disk from an image.
    pub fn create_root(
        &mut self,
        server_id: &str,
        sha512: &str,
        size_bytes: u64,
    ) -> Result<(), Error> {
        self.done(Request::CreateRoot {
            server_id: server_id.to_owned(),
            sha512: sha512.to_owned(),
            size_bytes,
        })
    }

    /// A read-write descriptor of a server's disk.
    pub fn open_root(&mut self, server_id: &str) -> Result<Disk, Error> {
        self.disk(Request::OpenRoot { server_id: server_id.to_owned() })
    }

    /// Removes a server's disk and config drive.
    pub fn delete_root(&mut self, server_id: &str) -> Result<(), Error> {
        self.done(Request::DeleteRoot { server_id: server_id.to_owned() })
    }

    /// Writes a server's config drive and gives a read-only descriptor of it.
    pub fn write_config_drive(
        &mut self,
        server_id: &str,
        files: &BTreeMap<String, Vec<u8>>,
    ) -> Result<Disk, Error> {
        let encode = |body: &Vec<u8>| base64::engine::general_purpose::STANDARD.encode(body);
        let files = files.iter().map(|(path, body)| (path.clone(), encode(body))).collect();
        self.disk(Request::WriteConfigDrive { server_id: server_id.to_owned(), files })
    }

    /// Makes an empty volume.
    pub fn create_volume(&mut self, volume_id: &str, size_bytes: u64) -> Result<(), Error> {
        self.done(Request::CreateVolume { volume_id: volume_id.to_owned(), size_bytes })
    }

    /// Removes a volume; see [`Request::DeleteVolume`].
    pub fn delete_volume(&mut self, volume_id: &str, generation: Option<u64>) -> Result<(), Error> {
        self.done(Request::DeleteVolume { volume_id: volume_id.to_owned(), generation })
    }

    /// Every volume with its home here.
    pub fn list_volumes(&mut self) -> Result<Vec<VolumeInfo>, Error> {
        match self.call(Request::ListVolumes, &[])?.0 {
            Reply::Volumes { volumes } => Ok(volumes),
            other => Err(unexpected(&other)),
        }
    }

    /// At the home, for a server on this host: a raw descriptor.
    pub fn attach_volume(&mut self, attachment: Attachment) -> Result<Disk, Error> {
        self.disk(Request::AttachVolume(attachment))
    }

    /// At the home, for a server on another host: permits its connection; gives the size.
    pub fn export_volume(&mut self, attachment: Attachment) -> Result<u64, Error> {
        match self.call(Request::ExportVolume(attachment), &[])?.0 {
            Reply::Disk { size_bytes, .. } => Ok(size_bytes),
            other => Err(unexpected(&other)),
        }
    }

    /// As [`Client::export_volume`], for the one host whose certificate has this name.
    pub fn export_volume_to(&mut self, attachment: Attachment, host: &str) -> Result<u64, Error> {
        let request = Request::ExportVolumeTo { attachment, host: host.to_owned() };
        match self.call(request, &[])?.0 {
            Reply::Disk { size_bytes, .. } => Ok(size_bytes),
            other => Err(unexpected(&other)),
        }
    }

    /// At the home: ends an attachment.
    pub fn detach_volume(
        &mut self,
        volume_id: &str,
        server_id: &str,
        generation: u64,
    ) -> Result<(), Error> {
        self.done(Request::DetachVolume {
            volume_id: volume_id.to_owned(),
            server_id: server_id.to_owned(),
            generation,
        })
    }

    /// At the server's host: a socket in NBD's transmission phase.
    pub fn connect_volume(
        &mut self,
        attachment: Attachment,
        size_bytes: u64,
        home: Peer,
    ) -> Result<Disk, Error> {
        self.disk(Request::ConnectVolume { attachment, size_bytes, home })
    }

    /// At the server's host: closes that connection.
    pub fn disconnect_volume(&mut self, volume_id: &str, server_id: &str) -> Result<(), Error> {
        self.done(Request::DisconnectVolume {
            volume_id: volume_id.to_owned(),
            server_id: server_id.to_owned(),
        })
    }

    fn done(&mut self, request: Request) -> Result<(), Error> {
        match self.call(request, &[])?.0 {
            Reply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    fn disk(&mut self, request: Request) -> Result<Disk, Error> {
        let (reply, descriptors) = self.call(request, &[])?;
        match (reply, descriptors.into_iter().next()) {
            (Reply::Disk { size_bytes, epoch }, Some(descriptor)) => {
                Ok(Disk { descriptor, size_bytes, epoch: epoch.unwrap_or_default() })
            }
            (Reply::Disk { .. }, None) => {
                Err(Error::unreachable("storage answered with a disk but no descriptor"))
            }
            (other, _) => Err(unexpected(&other)),
        }
    }

    fn call(
        &mut self,
        request: Request,
        descriptors: &[BorrowedFd<'_>],
    ) -> Result<(Reply, Vec<OwnedFd>), Error> {
        let failed = |act: &str, error: std::io::Error| {
            Error::unreachable(format!("{act} the storage process: {error}"))
        };
        let message = serde_json::to_vec(&Envelope { version: VERSION, request })
            .map_err(|error| Error::invalid(format!("encode a storage request: {error}")))?;
        abi::control::send(&self.socket, &message, descriptors)
            .map_err(|error| failed("send to", error))?;
        let (message, descriptors) = abi::control::receive(&self.socket)
            .map_err(|error| failed("receive from", error))?
            .ok_or_else(|| Error::unreachable("the storage process closed the connection"))?;
        match serde_json::from_slice(&message) {
            Ok(Reply::Error(error)) => Err(error),
            Ok(reply) => Ok((reply, descriptors)),
            Err(error) => Err(Error::unreachable(format!("decode a storage reply: {error}"))),
        }
    }
}

fn unexpected(reply: &Reply) -> Error {
    Error::new(ErrorKind::Unreachable, format!("storage answered out of turn: {reply:?}"))
}
