//! Kernel modules with all they need, in the order they load in.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::archive::Archive;

/// All modules of a kernel, by name.
pub(crate) struct Modules(BTreeMap<String, PathBuf>);

impl Modules {
    /// Finds every module below `directory`.
    pub(crate) fn find(directory: &Path) -> Result<Modules> {
        let mut found = BTreeMap::new();
        let mut directories = vec![directory.to_path_buf()];
        while let Some(directory) = directories.pop() {
            let entries = fs::read_dir(&directory)
                .with_context(|| format!("read {}", directory.display()))?;
            for path in entries.flatten().map(|entry| entry.path()) {
                if path.is_dir() {
                    directories.push(path);
                } else if path.extension().is_some_and(|extension| extension == "ko") {
                    let name = path.file_stem().unwrap_or_default().to_string_lossy();
                    found.insert(name.replace('-', "_"), path);
                }
            }
        }
        Ok(Modules(found))
    }

    /// Adds modules and `modules.list`, their file names in loading order, to an archive.
    pub(crate) fn add(&self, archive: &mut Archive, names: &[&str]) -> Result<()> {
        let mut order = Vec::new();
        for name in names {
            self.place(name, &mut order)?;
        }
        let mut list = String::new();
        for (file, content) in &order {
            archive.file(&format!("modules/{file}"), content);
            list.push_str(file);
            list.push('\n');
        }
        archive.file("modules.list", list.as_bytes());
        Ok(())
    }

    fn place(&self, name: &str, order: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        let name = name.replace('-', "_");
        // What the kernel has built in is no file.
        let Some(path) = self.0.get(&name) else { return Ok(()) };
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if order.iter().any(|(placed, _)| *placed == file) {
            return Ok(());
        }
        let content = fs::read(path).with_context(|| format!("read {}", path.display()))?;
        for needed in depends(&content) {
            self.place(&needed, order)?;
        }
        order.push((file, content));
        Ok(())
    }
}

/// The names after `depends=` in a module's `.modinfo` section.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = &module[at + KEY.len()..];
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(0);
    let names = String::from_utf8_lossy(&value[..end]);
    names.split(',').filter(|name| !name.is_empty()).map(str::to_string).collect()
}
