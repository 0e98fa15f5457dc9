//! The gate of the volumes whose home is this host.
//!
//! One server holds a volume at a time, by generation. A generation never goes back:
//!
//! ```text
//!               attach or export, generation g, server s
//!   free at f ------------------------------------------> held by s at g        g >= f
//!             <------------------------------------------
//!               detach, generation >= g, server s
//!
//!   held by s at g: again by s at g → the same;  by t at g → in_use;  at less than g → stale
//!   held by s at g: by anyone at more than g → s is cut off, then held at the newer generation
//! ```
//!
//! Cutting off an export closes its connection and waits for what it has in flight. A raw
//! descriptor can't be taken back, so each carries a shared `flock` of its own open file: the lock
//! lives exactly as long as any copy of the descriptor, in whatever process. A change of holder
//! needs that lock alone, and is refused until whoever has the descriptor has ended.

use crate::control::{
    Access, Attachment, Error, ErrorKind, Holder, VolumeInfo, check_id, check_size,
};
use crate::directory::{self, Directory};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// Most volumes with their home on one host.
pub(crate) const VOLUMES_MAX: usize = 10_000;
/// How long a connection that is cut off may take to end what it has in flight.
const CUT_OFF_MAX: Duration = Duration::from_secs(30);
const VERSION: u32 = 1;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    version: u32,
    id: String,
    size_bytes: u64,
    generation: u64,
    holder: Option<Holder>,
}

#[derive(Debug)]
struct Volume {
    record: Record,
    session: Option<Session>,
}

/// The gate's end of a connection from another host.
#[derive(Debug)]
struct Session {
    stop: watch::Sender<()>,
    ended: watch::Receiver<()>,
}

/// The connection's end: it stops when [`SessionGuard::stopped`] returns, finishes what it has in
/// flight and drops this.
#[derive(Debug)]
pub(crate) struct SessionGuard {
    stop: watch::Receiver<()>,
    _ended: watch::Sender<()>,
}

/// What a connection from another host is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ExportName {
    pub(crate) volume_id: String,
    pub(crate) generation: u64,
    pub(crate) server_id: String,
}

/// An export that is open: the gate waits for `guard` to be dropped.
#[derive(Debug)]
pub(crate) struct OpenExport {
    pub(crate) file: File,
    pub(crate) size_bytes: u64,
    pub(crate) read_only: bool,
    pub(crate) guard: SessionGuard,
}

/// The volumes of one host.
#[derive(Debug)]
pub(crate) struct Volumes {
    directory: Arc<Directory>,
    runtime: Handle,
    volumes: Mutex<BTreeMap<String, Volume>>,
}

/// What the gate's rules say to a claim.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    /// The claimant holds it already.
    Keep,
    /// The claimant becomes the holder; whoever was is cut off first.
    Take,
    /// Nobody but the holder.
    InUse,
    /// The claim's time is over.
    Stale,
}

fn judge(record: &Record, claim: &Attachment, access: Access) -> Verdict {
    let same = |holder: &Holder| {
        holder.server_id == claim.server_id
            && holder.access == access
            && holder.read_only == claim.read_only
    };
    match &record.holder {
        _ if claim.generation < record.generation => Verdict::Stale,
        _ if claim.generation > record.generation => Verdict::Take,
        None => Verdict::Take,
        Some(holder) if same(holder) => Verdict::Keep,
        Some(_) => Verdict::InUse,
    }
}

impl ExportName {
    /// Reads `volume/<id>/<generation>/<server id>`.
    pub(crate) fn parse(name: &str) -> Option<Self> {
        let mut parts = name.strip_prefix("volume/")?.split('/');
        let (volume_id, generation, server_id) = (parts.next()?, parts.next()?, parts.next()?);
        if parts.next().is_some() || check_id("", volume_id).is_err() {
            return None;
        }
        check_id("", server_id).ok()?;
        Some(Self {
            volume_id: volume_id.to_owned(),
            generation: generation.parse().ok()?,
            server_id: server_id.to_owned(),
        })
    }
}

impl std::fmt::Display for ExportName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "volume/{}/{}/{}", self.volume_id, self.generation, self.server_id)
    }
}

impl Volumes {
    /// Reads what is there, with its holders. An entry that makes no sense is left alone.
    pub(crate) fn open(directory: Arc<Directory>, runtime: Handle) -> io::Result<Self> {
        let mut volumes = BTreeMap::new();
        for entry in fs::read_dir(directory.volumes())? {
            let path = entry?.path();
            match read_record(&path) {
                Ok(record) => {
                    volumes.insert(record.id.clone(), Volume { record, session: None });
                }
                Err(error) => {
                    tracing::error!(path = %path.display(), %error, "volume not served");
                }
            }
        }
        Ok(Self { directory, runtime, volumes: Mutex::new(volumes) })
    }

    /// Every volume, by id.
    pub(crate) fn list(&self) -> Vec<VolumeInfo> {
        self.lock().values().map(Volume::info).collect()
    }

    /// Makes an empty volume.
    pub(crate) fn create(&self, volume_id: &str, size_bytes: u64) -> Result<(), Error> {
        check_id("volume", volume_id)?;
        check_size("volume", size_bytes)?;
        let mut volumes = self.lock();
        if let Some(volume) = volumes.get(volume_id) {
            return if volume.record.size_bytes == size_bytes {
                Ok(())
            } else {
                Err(Error::new(
                    ErrorKind::Exists,
                    format!("volume {volume_id} exists with {} bytes", volume.record.size_bytes),
                ))
            };
        }
        if volumes.len() >= VOLUMES_MAX {
            return Err(Error::invalid(format!("this host has {VOLUMES_MAX} volumes, its limit")));
        }
        let record = Record {
            version: VERSION,
            id: volume_id.to_owned(),
            size_bytes,
            generation: 0,
            holder: None,
        };
        self.make(&record)
            .map_err(|error| Error::io(format_args!("make volume {volume_id}"), error))?;
        volumes.insert(volume_id.to_owned(), Volume { record, session: None });
        Ok(())
    }

    fn make(&self, record: &Record) -> io::Result<()> {
        let staging = self.directory.staging("volume");
        directory::make(staging.path())?;
        let data = directory::create_new(&staging.path().join("data"))?;
        data.set_len(record.size_bytes)?;
        data.sync_all()?;
        let mut file = directory::create_new(&staging.path().join("volume.json"))?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        file.sync_all()?;
        directory::sync(staging.path())?;
        let place = self.path(&record.id);
        fs::rename(staging.path(), &place)?;
        directory::sync_parent(&place)
    }

    /// Removes a volume that nobody holds, or that is held at an older generation.
    pub(crate) fn delete(&self, volume_id: &str, generation: Option<u64>) -> Result<(), Error> {
        check_id("volume", volume_id)?;
        let mut volumes = self.lock();
        let Some(volume) = volumes.get_mut(volume_id) else {
            return Ok(());
        };
        let newer = generation.is_some_and(|generation| generation > volume.record.generation);
        if let (Some(holder), false) = (&volume.record.holder, newer) {
            return Err(held(volume_id, holder, volume.record.generation));
        }
        self.cut_off(volume)?;
        self.directory.remove(&self.path(volume_id))?;
        volumes.remove(volume_id);
        Ok(())
    }

    /// Makes a server the holder, durably, and opens the volume for it.
    pub(crate) fn attach(&self, claim: &Attachment) -> Result<(File, u64), Error> {
        let mut volumes = self.lock();
        let record = self.claim(&mut volumes, claim, Access::Local)?;
        let file = self.open_data(&record.id, claim.read_only)?;
        Ok((file, record.size_bytes))
    }

    /// Makes a server on another host the holder, durably; its size.
    pub(crate) fn export(&self, claim: &Attachment) -> Result<u64, Error> {
        Ok(self.claim(&mut self.lock(), claim, Access::Export)?.size_bytes)
    }

    fn claim(
        &self,
        volumes: &mut BTreeMap<String, Volume>,
        claim: &Attachment,
        access: Access,
    ) -> Result<Record, Error> {
        check_id("volume", &claim.volume_id)?;
        check_id("server", &claim.server_id)?;
        let volume = volumes.get_mut(&claim.volume_id).ok_or_else(|| missing(&claim.volume_id))?;
        match (judge(&volume.record, claim, access), &volume.record.holder) {
            (Verdict::Keep, _) => return Ok(volume.record.clone()),
            (Verdict::Take, _) => {}
            (Verdict::InUse, Some(holder)) => {
                return Err(held(&claim.volume_id, holder, volume.record.generation));
            }
            (Verdict::Stale | Verdict::InUse, _) => {
                return Err(stale(&claim.volume_id, claim.generation, volume.record.generation));
            }
        }
        self.cut_off(volume)?;
        self.check_closed(&claim.volume_id)?;
        let holder =
            Holder { server_id: claim.server_id.clone(), access, read_only: claim.read_only };
        self.record(
            volume,
            Record { generation: claim.generation, holder: Some(holder), ..volume.record.clone() },
        )?;
        Ok(volume.record.clone())
    }

    /// Ends an attachment, unless a newer one has taken its place.
    pub(crate) fn detach(
        &self,
        volume_id: &str,
        server_id: &str,
        generation: u64,
    ) -> Result<(), Error> {
        check_id("volume", volume_id)?;
        check_id("server", server_id)?;
        let mut volumes = self.lock();
        let Some(volume) = volumes.get_mut(volume_id) else {
            return Ok(());
        };
        let holds =
            volume.record.holder.as_ref().is_some_and(|holder| holder.server_id == server_id);
        if !holds || generation < volume.record.generation {
            return Ok(());
        }
        self.cut_off(volume)?;
        self.record(volume, Record { generation, holder: None, ..volume.record.clone() })
    }

    /// What a connection from another host would open: its size and whether it may only read.
    pub(crate) fn look_up(&self, name: &ExportName) -> Result<(u64, bool), Error> {
        let volumes = self.lock();
        let volume = volumes.get(&name.volume_id).ok_or_else(|| missing(&name.volume_id))?;
        let read_only = volume.admit(name)?;
        Ok((volume.record.size_bytes, read_only))
    }

    /// Opens a volume for a connection from another host. An earlier connection of the same
    /// attachment is cut off: its peer may have lost it without our knowing.
    pub(crate) fn connect(&self, name: &ExportName) -> Result<OpenExport, Error> {
        let mut volumes = self.lock();
        let volume = volumes.get_mut(&name.volume_id).ok_or_else(|| missing(&name.volume_id))?;
        let read_only = volume.admit(name)?;
        self.cut_off(volume)?;
        let file = self.open_data(&name.volume_id, read_only)?;
        let (stop, stopped) = watch::channel(());
        let (ending, ended) = watch::channel(());
        volume.session = Some(Session { stop, ended });
        let guard = SessionGuard { stop: stopped, _ended: ending };
        Ok(OpenExport { file, size_bytes: volume.record.size_bytes, read_only, guard })
    }

    /// Closes the volume's connection, if any, and waits until it touches the volume no more.
    fn cut_off(&self, volume: &mut Volume) -> Result<(), Error> {
        let Some(session) = &mut volume.session else {
            return Ok(());
        };
        session.stop.send_replace(());
        let ended = &mut session.ended;
        // The only message is the end: `changed` fails when the connection drops its half.
        let waited = self
            .runtime
            .block_on(async { tokio::time::timeout(CUT_OFF_MAX, ended.changed()).await });
        if waited.is_err() {
            return Err(Error::new(
                ErrorKind::Io,
                format!(
                    "volume {}: its connection did not end within {} seconds",
                    volume.record.id,
                    CUT_OFF_MAX.as_secs()
                ),
            ));
        }
        volume.session = None;
        Ok(())
    }

    /// Refuses while any copy of a descriptor that was handed out is open.
    fn check_closed(&self, volume_id: &str) -> Result<(), Error> {
        let path = self.data(volume_id);
        let failed = |error| Error::io(format_args!("lock {}", path.display()), error);
        let data = OpenOptions::new().read(true).write(true).open(&path).map_err(failed)?;
        match flock(&data, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::in_use(format!(
                "volume {volume_id}: a descriptor of it is still open in a guest's process"
            ))),
            Err(error) => Err(failed(error.into())),
        }
    }

    fn open_data(&self, volume_id: &str, read_only: bool) -> Result<File, Error> {
        let path = self.data(volume_id);
        let failed = |error| Error::io(format_args!("open {}", path.display()), error);
        let data = OpenOptions::new().read(true).write(!read_only).open(&path).map_err(failed)?;
        flock(&data, FlockOperation::NonBlockingLockShared)
            .map_err(|error| failed(error.into()))?;
        Ok(data)
    }

    fn record(&self, volume: &mut Volume, record: Record) -> Result<(), Error> {
        let path = self.path(&record.id).join("volume.json");
        serde_json::to_vec_pretty(&record)
            .map_err(io::Error::from)
            .and_then(|bytes| self.directory.write(&path, &bytes))
            .map_err(|error| Error::io(format_args!("write {}", path.display()), error))?;
        volume.record = record;
        Ok(())
    }

    fn path(&self, volume_id: &str) -> PathBuf {
        self.directory.volumes().join(volume_id)
    }

    fn data(&self, volume_id: &str) -> PathBuf {
        self.path(volume_id).join("data")
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Volume>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Volume {
    fn info(&self) -> VolumeInfo {
        VolumeInfo {
            id: self.record.id.clone(),
            size_bytes: self.record.size_bytes,
            generation: self.record.generation,
            attached: self.record.holder.clone(),
            connected: self.session.as_ref().is_some_and(|s| s.ended.has_changed().is_ok()),
        }
    }

    /// Whether a connection may only read; an error where it is not the holder's.
    fn admit(&self, name: &ExportName) -> Result<bool, Error> {
        if name.generation < self.record.generation {
            return Err(stale(&name.volume_id, name.generation, self.record.generation));
        }
        match &self.record.holder {
            Some(holder)
                if holder.access == Access::Export
                    && holder.server_id == name.server_id
                    && name.generation == self.record.generation =>
            {
                Ok(holder.read_only)
            }
            _ => Err(Error::in_use(format!(
                "volume {} is not exported to server {} at generation {}",
                name.volume_id, name.server_id, name.generation
            ))),
        }
    }
}

impl SessionGuard {
    /// Returns when the gate cuts the connection off.
    pub(crate) async fn stopped(&mut self) {
        // An error means that the gate itself is gone: the end as well.
        let _ = self.stop.changed().await;
    }
}

fn read_record(path: &Path) -> io::Result<Record> {
    let record: Record = serde_json::from_slice(&fs::read(path.join("volume.json"))?)?;
    let invalid = |message: String| Err(io::Error::new(io::ErrorKind::InvalidData, message));
    if record.version != VERSION {
        return invalid(format!("version {}; this program reads {VERSION}", record.version));
    }
    if path.file_name() != Some(record.id.as_ref()) {
        return invalid(format!("its record names volume {:?}", record.id));
    }
    let found_bytes = fs::metadata(path.join("data"))?.len();
    if found_bytes != record.size_bytes {
        return invalid(format!("{found_bytes} bytes; its record says {}", record.size_bytes));
    }
    Ok(record)
}

fn missing(volume_id: &str) -> Error {
    Error::not_found(format!("volume {volume_id} does not have its home here"))
}

fn held(volume_id: &str, holder: &Holder, generation: u64) -> Error {
    Error::in_use(format!(
        "volume {volume_id} is held by server {} at generation {generation}",
        holder.server_id
    ))
}

fn stale(volume_id: &str, generation: u64, newest: u64) -> Error {
    Error::new(
        ErrorKind::Stale,
        format!("volume {volume_id}: generation {generation} is older than {newest}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(generation: u64, holder: Option<(&str, Access)>) -> Record {
        let holder = holder.map(|(server_id, access)| Holder {
            server_id: server_id.to_owned(),
            access,
            read_only: false,
        });
        Record { version: VERSION, id: "v".to_owned(), size_bytes: 512, generation, holder }
    }

    fn claim(server_id: &str, generation: u64) -> Attachment {
        Attachment {
            volume_id: "v".to_owned(),
            server_id: server_id.to_owned(),
            generation,
            read_only: false,
        }
    }

    #[test]
    fn the_gate_admits_one_holder_and_never_an_older_generation() {
        let free = record(3, None);
        let held = record(3, Some(("a", Access::Local)));
        let check = |record: &Record, server, generation, access, expected| {
            assert_eq!(judge(record, &claim(server, generation), access), expected);
        };
        check(&free, "a", 2, Access::Local, Verdict::Stale);
        check(&free, "a", 3, Access::Local, Verdict::Take);
        check(&free, "a", 4, Access::Export, Verdict::Take);
        check(&held, "a", 3, Access::Local, Verdict::Keep);
        check(&held, "a", 3, Access::Export, Verdict::InUse);
        check(&held, "b", 3, Access::Local, Verdict::InUse);
        check(&held, "b", 4, Access::Local, Verdict::Take);
        check(&held, "a", 2, Access::Local, Verdict::Stale);
    }

    #[test]
    fn export_names_are_read_strictly() {
        let name =
            ExportName { volume_id: "v-1".to_owned(), generation: 7, server_id: "s-1".to_owned() };
        assert_eq!(ExportName::parse(&name.to_string()), Some(name));
        for wrong in
            ["", "volume/", "volume/v/1", "volume/v/1/s/x", "volume/../1/s", "volume/v/-1/s"]
        {
            assert_eq!(ExportName::parse(wrong), None, "{wrong}");
        }
    }
}
