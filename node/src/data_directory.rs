//! The data directory of a node: its paths, and making one whole or not at all.

use crate::cluster_keys::{self, ClusterKeys};
use crate::config::{self, NodeConfig};
use crate::files::{self, Access};
use crate::pki::Authority;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// What a recovery has prepared and not yet put in place.
pub(crate) const RECOVERY: &str = "recovery";

/// Paths of a data directory.
#[derive(Clone, Debug)]
pub(crate) struct DataDirectory {
    root: PathBuf,
}

/// What `init` and `join` write.
pub(crate) struct Contents<'a> {
    /// `node.toml`.
    pub(crate) config: &'a NodeConfig,
    /// The cluster's authority.
    pub(crate) authority: &'a Authority,
    /// This node's key, PEM.
    pub(crate) key_pem: &'a str,
    /// This node's certificate, PEM.
    pub(crate) certificate_pem: &'a str,
    /// The cluster's keys.
    pub(crate) cluster_keys: ClusterKeys,
    /// Further files: name, content, who may read them.
    pub(crate) more: Vec<(&'static str, String, Access)>,
    /// What else must be in it before it is there: the log of a restored state, by the path of the
    /// `raft` directory.
    pub(crate) log: Option<&'a FillLog<'a>>,
}

/// Makes the log of a data directory that isn't empty from the start.
pub(crate) type FillLog<'a> = dyn Fn(&Path) -> Result<()> + 'a;

/// Keys and certificates of a node, read at its start.
pub(crate) struct Secrets {
    /// The cluster's authority.
    pub(crate) authority: Authority,
    /// This node's key, PEM.
    pub(crate) key_pem: String,
    /// This node's certificate, PEM.
    pub(crate) certificate_pem: String,
    /// The cluster's keys, as they were then.
    pub(crate) cluster_keys: ClusterKeys,
}

impl DataDirectory {
    /// The data directory at `path`, which must be there.
    pub(crate) fn open(path: &Path) -> Result<DataDirectory> {
        let root = path
            .canonicalize()
            .with_context(|| format!("cannot open the data directory {}", path.display()))?;
        Ok(DataDirectory { root })
    }

    /// Fails where a data directory could not be made at `path`.
    pub(crate) fn check_free(path: &Path) -> Result<()> {
        match fs::read_dir(path).map(|mut entries| entries.next().is_some()) {
            Ok(true) => {
                bail!(
                    "{} is not empty; choose another --data-dir, or remove it if nothing in it is needed",
                    path.display()
                )
            }
            Ok(false) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot look at {}", path.display())),
        }
    }

    /// Makes a data directory: beside its place first, then renamed into it.
    pub(crate) fn create(path: &Path, contents: &Contents<'_>) -> Result<DataDirectory> {
        use std::os::unix::fs::DirBuilderExt;
        Self::check_free(path)?;
        let path = std::path::absolute(path)?;
        let parent = path.parent().context("the data directory can't be /")?;
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
        let name = path.file_name().context("the data directory needs a name")?.to_string_lossy();
        let partial = parent.join(format!(".{name}.{}.partial", std::process::id()));
        let made = fs::DirBuilder::new().mode(0o700).create(&partial);
        made.with_context(|| format!("cannot make {}", partial.display()))?;
        let filled = Self::fill(&DataDirectory { root: partial.clone() }, contents)
            .and_then(|()| Ok(fs::rename(&partial, &path)?))
            .and_then(|()| Ok(files::sync_parent(&path)?));
        if let Err(error) = filled {
            let _ = fs::remove_dir_all(&partial);
            return Err(error.context(format!("cannot make {}", path.display())));
        }
        Self::open(&path)
    }

    fn fill(&self, contents: &Contents<'_>) -> Result<()> {
        let write = |name: &str, content: &[u8], access| {
            let path = self.root.join(name);
            files::write_new(&path, content, access)
                .with_context(|| format!("cannot write {}", path.display()))
        };
        write(config::FILE_NAME, contents.config.text().as_bytes(), Access::Public)?;
        write("ca.pem", contents.authority.certificate_pem.as_bytes(), Access::Public)?;
        write("ca-key.pem", contents.authority.key_pem().as_bytes(), Access::Secret)?;
        write("node.pem", contents.certificate_pem.as_bytes(), Access::Public)?;
        write("node-key.pem", contents.key_pem.as_bytes(), Access::Secret)?;
        let keys = contents.cluster_keys.text();
        write(cluster_keys::FILE_NAME, keys.as_bytes(), Access::Secret)?;
        for (name, content, access) in &contents.more {
            write(name, content.as_bytes(), *access)?;
        }
        for directory in ["raft", "storage", "guests", "log", "run", "bin"] {
            fs::create_dir(self.root.join(directory))?;
        }
        if let Some(log) = contents.log {
            log(&self.root.join("raft"))?;
        }
        fs::File::open(&self.root)?.sync_all()?;
        Ok(())
    }

    /// Reads keys and certificates of the cluster.
    pub(crate) fn secrets(&self, cluster_id: &str) -> Result<Secrets> {
        let read = |name: &str| {
            let path = self.root.join(name);
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let cluster_keys = ClusterKeys::read(&self.join(cluster_keys::FILE_NAME))?;
        Ok(Secrets {
            authority: Authority::from_pem(cluster_id, read("ca.pem")?, read("ca-key.pem")?),
            key_pem: read("node-key.pem")?,
            certificate_pem: read("node.pem")?,
            cluster_keys,
        })
    }

    /// The directory itself.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// A path below it.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The record of a process that belongs to this directory, see [`crate::process`].
    pub(crate) fn process_record(&self, name: &str) -> PathBuf {
        self.root.join("run").join(format!("{name}.json"))
    }

    /// Where guests have their directories.
    pub(crate) fn guests(&self) -> PathBuf {
        self.root.join("guests")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn create(
        path: &Path,
        keys: &ClusterKeys,
        more: Vec<(&'static str, String, Access)>,
    ) -> Result<DataDirectory> {
        let config = config::example();
        let authority = Authority::create(&config.cluster_id).unwrap();
        let contents = Contents {
            config: &config,
            authority: &authority,
            key_pem: "key",
            certificate_pem: "certificate",
            cluster_keys: keys.clone(),
            more,
            log: None,
        };
        DataDirectory::create(path, &contents)
    }

    #[test]
    fn what_was_made_reads_back_and_secrets_are_the_owners() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a/node1");
        let keys = ClusterKeys::random();
        let made = create(&path, &keys, Vec::new()).unwrap();
        let secrets = made.secrets("c").unwrap();
        assert_eq!(secrets.cluster_keys, keys);
        assert_eq!(secrets.key_pem, "key");
        assert_eq!(NodeConfig::read(made.root()).unwrap(), config::example());
        for secret in ["ca-key.pem", "node-key.pem", "cluster.key"] {
            let mode = fs::metadata(path.join(secret)).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{secret}");
        }
    }

    #[test]
    fn a_directory_with_something_in_it_is_left_alone() {
        let scratch = tempfile::tempdir().unwrap();
        fs::write(scratch.path().join("mine"), "x").unwrap();
        let error =
            create(scratch.path(), &ClusterKeys::random(), Vec::new()).unwrap_err().to_string();
        assert!(error.contains("is not empty"), "{error}");
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 1);
    }

    #[test]
    fn nothing_is_left_of_a_failed_attempt() {
        let scratch = tempfile::tempdir().unwrap();
        let impossible = vec![("no/such/place", String::new(), Access::Public)];
        let made = create(&scratch.path().join("node1"), &ClusterKeys::random(), impossible);
        assert!(made.is_err());
        assert_eq!(fs::read_dir(scratch.path()).unwrap().count(), 0);
    }
}
