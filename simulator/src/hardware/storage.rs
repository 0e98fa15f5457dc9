//! The gate of a host's volumes, with the rules of the `storage` crate: one holder at a time by
//! generation; a newer one cuts the older off before it is answered; a raw descriptor can't be
//! taken back, so a change of holder is refused until it is closed.

use std::collections::{BTreeMap, BTreeSet};

use controller::ids::{ServerId, VolumeId};
use controller::plan::observed;

/// How a holder reaches its volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Access {
    /// By a descriptor, on this host.
    Local,
    /// By a connection from another host.
    Export,
}

/// A claim on a volume.
#[derive(Clone, Debug)]
pub(crate) struct Claim {
    /// Which.
    pub(crate) volume: VolumeId,
    /// For whom.
    pub(crate) server: ServerId,
    /// The attachment's generation.
    pub(crate) generation: u64,
}

/// One volume's record, durable, and its connection, which is not.
#[derive(Clone, Debug, Default)]
struct Volume {
    generation: u64,
    holder: Option<(ServerId, Access)>,
    /// The host that an export is for: the one that was named.
    host: Option<String>,
    session: Option<u64>,
    /// Servers whose guests hold a descriptor.
    open: BTreeSet<ServerId>,
}

/// A host's storage.
#[derive(Clone, Debug, Default)]
pub(crate) struct Storage {
    /// Whether its process lives.
    pub(crate) up: bool,
    /// Names its process.
    pub(crate) instance: u64,
    volumes: BTreeMap<VolumeId, Volume>,
    /// Root disks.
    pub(crate) roots: BTreeSet<ServerId>,
    /// Contents of images.
    pub(crate) images: BTreeSet<String>,
    sessions: u64,
}

/// Why storage refused.
pub(crate) type Refusal = String;

impl Storage {
    /// Storage that runs and holds one image at most.
    pub(crate) fn new(image: Option<&str>) -> Storage {
        let images = image.into_iter().map(str::to_owned).collect();
        Storage { up: true, images, ..Storage::default() }
    }

    /// Its process ends: connections with it.
    pub(crate) fn stop(&mut self) {
        self.up = false;
        for volume in self.volumes.values_mut() {
            volume.session = None;
        }
    }

    /// It runs again.
    pub(crate) fn start(&mut self) {
        if !self.up {
            self.up = true;
            self.instance += 1;
        }
    }

    fn answering(&self) -> Result<(), Refusal> {
        if self.up { Ok(()) } else { Err("storage does not answer".into()) }
    }

    fn get(&mut self, id: &VolumeId) -> Result<&mut Volume, Refusal> {
        self.answering()?;
        self.volumes.get_mut(id).ok_or_else(|| format!("volume {id} isn't here"))
    }

    /// What the agent sees.
    pub(crate) fn observed(&self) -> BTreeMap<VolumeId, observed::Volume> {
        let volumes = self.volumes.iter().map(|(id, volume)| {
            let holder = volume.holder.as_ref();
            let holder = holder.map(|(server, _)| (server.clone(), volume.generation));
            (id.clone(), observed::Volume { holder, host: volume.host.clone() })
        });
        volumes.collect()
    }

    /// Makes a volume; again changes nothing.
    pub(crate) fn create(&mut self, id: &VolumeId) -> Result<(), Refusal> {
        self.answering()?;
        self.volumes.entry(id.clone()).or_default();
        Ok(())
    }

    /// Removes a volume that nobody holds, or that is held at an older generation.
    pub(crate) fn delete(&mut self, id: &VolumeId, generation: Option<u64>) -> Result<(), Refusal> {
        self.answering()?;
        let Some(volume) = self.volumes.get(id) else { return Ok(()) };
        let newer = generation.is_some_and(|generation| generation > volume.generation);
        if volume.holder.is_some() && !newer {
            return Err(format!("volume {id} is held"));
        }
        self.volumes.remove(id);
        Ok(())
    }

    /// Makes a server the holder.
    fn claim(&mut self, claim: &Claim, access: Access) -> Result<(), Refusal> {
        let volume = self.get(&claim.volume)?;
        let same = volume.holder.as_ref() == Some(&(claim.server.clone(), access));
        if claim.generation < volume.generation {
            return Err(format!("volume {}: an older generation", claim.volume));
        }
        if claim.generation == volume.generation && volume.holder.is_some() {
            return if same { Ok(()) } else { Err(format!("volume {} is in use", claim.volume)) };
        }
        if !volume.open.is_empty() {
            return Err(format!("volume {}: a descriptor is still open", claim.volume));
        }
        volume.session = None;
        volume.generation = claim.generation;
        volume.holder = Some((claim.server.clone(), access));
        volume.host = None;
        Ok(())
    }

    /// Makes a server on another host the holder; only that host may connect.
    pub(crate) fn export(&mut self, claim: &Claim, host: &str) -> Result<(), Refusal> {
        self.claim(claim, Access::Export)?;
        let volume = self.get(&claim.volume)?;
        match &volume.host {
            Some(bound) if bound != host => {
                Err(format!("volume {} is exported to {bound}, not to {host}", claim.volume))
            }
            _ => {
                volume.host = Some(host.to_owned());
                Ok(())
            }
        }
    }

    /// Makes a server on this host the holder, and gives its guest a descriptor.
    pub(crate) fn attach(&mut self, claim: &Claim) -> Result<(), Refusal> {
        self.claim(claim, Access::Local)?;
        self.get(&claim.volume)?.open.insert(claim.server.clone());
        Ok(())
    }

    /// Opens an exported volume for a connection from a host; an earlier one is cut off.
    pub(crate) fn connect(&mut self, claim: &Claim, host: &str) -> Result<u64, Refusal> {
        self.sessions += 1;
        let session = self.sessions;
        let volume = self.get(&claim.volume)?;
        let holder = Some((claim.server.clone(), Access::Export));
        if volume.generation != claim.generation || volume.holder != holder {
            return Err(format!("volume {} isn't exported to {}", claim.volume, claim.server));
        }
        if volume.host.as_deref() != Some(host) {
            return Err(format!("volume {} isn't exported to {host}", claim.volume));
        }
        volume.session = Some(session);
        Ok(session)
    }

    /// Whether a connection is the volume's.
    pub(crate) fn is_connected(&self, id: &VolumeId, session: u64) -> bool {
        self.up && self.volumes.get(id).is_some_and(|volume| volume.session == Some(session))
    }

    /// Ends an attachment, unless a newer one has taken its place.
    pub(crate) fn detach(
        &mut self,
        id: &VolumeId,
        server: &ServerId,
        generation: u64,
    ) -> Result<(), Refusal> {
        self.answering()?;
        let Some(volume) = self.volumes.get_mut(id) else { return Ok(()) };
        let holds = volume.holder.as_ref().is_some_and(|(holder, _)| holder == server);
        if holds && generation >= volume.generation {
            volume.session = None;
            volume.generation = generation;
            volume.holder = None;
            volume.host = None;
        }
        Ok(())
    }

    /// A guest closed its descriptor of a volume.
    pub(crate) fn descriptor_closed(&mut self, id: &VolumeId, server: &ServerId) {
        if let Some(volume) = self.volumes.get_mut(id) {
            volume.open.remove(server);
        }
    }

    /// A guest's process ended: its descriptors are closed.
    pub(crate) fn descriptors_closed(&mut self, server: &ServerId) {
        for volume in self.volumes.values_mut() {
            volume.open.remove(server);
        }
    }
}
