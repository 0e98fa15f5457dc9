//! Builds what `trine` carries inside itself: the VMM and the floor program as small static
//! executables, and the built-in guest image.
//!
//! Each is a Cargo build of its own, because each needs other settings than the product: the
//! VMM is linked statically and without relocations (they cost 0.8 ms a launch), the guest has
//! no operating system below it. They share `embedded/` in the target directory, so that every
//! profile of the product uses the same ones.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let root = root.parent().expect("the crate lies in the workspace").to_path_buf();
    let out = PathBuf::from(env::var("OUT_DIR").expect("cargo sets it"));
    for watched in ["vmm", "abi", "firmware", "Cargo.lock"] {
        watch(&root.join(watched));
    }
    let builds = target_directory(&out).join("embedded");
    build_vmm(&root, &builds.join("vmm"));
    build_guest(&root, &builds.join("guest"));

    let vmm = builds.join("vmm").join(TARGET).join("vmm");
    embed(&vmm.join("trine-vmm"), &out.join("trine-vmm"));
    embed(&vmm.join("kvm-floor"), &out.join("kvm-floor"));
    embed(&builds.join("guest/release/guest"), &out.join("guest.elf"));
}

/// Every source file, but no build output: a directory named `target` would wake us each time.
fn watch(path: &Path) {
    if path.is_dir() {
        let entries = fs::read_dir(path)
            .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
        for entry in entries.flatten() {
            if entry.file_name() != "target" && entry.file_name() != "tests" {
                watch(&entry.path());
            }
        }
    } else {
        println!("cargo::rerun-if-changed={}", path.display());
    }
}

/// `target`, seen from `target/PROFILE/build/node-HASH/out`.
fn target_directory(out: &Path) -> PathBuf {
    out.ancestors()
        .nth(4)
        .expect("OUT_DIR lies four levels below the target directory")
        .to_path_buf()
}

fn build_vmm(root: &Path, target: &Path) {
    let flags =
        |linking: &str| format!("-C target-cpu=x86-64 -C relocation-model=static {linking}");
    let build = |flags: String| {
        cargo(root)
            .args([
                "build",
                "--locked",
                "--profile",
                "vmm",
                "--package",
                "vmm",
                "--bins",
                "--target",
                TARGET,
            ])
            .arg("--target-dir")
            .arg(target)
            .env("CARGO_ENCODED_RUSTFLAGS", flags.replace(' ', "\x1f"))
            .status()
    };
    let linked_static = build(flags("-C target-feature=+crt-static"));
    if linked_static.is_ok_and(|status| status.success()) {
        return;
    }
    println!(
        "cargo::warning=the VMM could not be linked statically (glibc's static library is missing?); \
         a dynamic one is embedded, and each launch takes about 1 ms longer"
    );
    let status = build(flags("-C target-feature=-crt-static")).expect("cargo can be started");
    assert!(status.success(), "building the VMM failed: see the compiler's messages above");
}

fn build_guest(root: &Path, target: &Path) {
    let manifest = root.join("firmware/Cargo.toml");
    let status = cargo(&root.join("firmware"))
        .args(["build", "--locked", "--release", "--package", "guest", "--manifest-path"])
        .arg(manifest)
        .arg("--target-dir")
        .arg(target)
        .status()
        .expect("cargo can be started");
    assert!(status.success(), "building the guest image failed: see the compiler's messages above");
}

/// Cargo without the settings of the build that runs us.
fn cargo(directory: &Path) -> Command {
    let mut command = Command::new(env::var_os("CARGO").expect("cargo sets it"));
    command.current_dir(directory);
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy().into_owned();
        let inherited = ["CARGO_HOME", "CARGO_NET_OFFLINE", "CARGO_TERM_COLOR"];
        if (name.starts_with("CARGO") || name.starts_with("RUSTC") || name == "RUSTFLAGS")
            && !inherited.contains(&name.as_str())
            && !name.starts_with("CARGO_REGISTRIES")
            && !name.starts_with("CARGO_HTTP")
        {
            command.env_remove(name);
        }
    }
    command
}

/// Copies only a changed file, so that an unchanged one does not rebuild the product.
fn embed(from: &Path, to: &Path) {
    let new =
        fs::read(from).unwrap_or_else(|error| panic!("cannot read {}: {error}", from.display()));
    if fs::read(to).ok().as_ref() != Some(&new) {
        fs::write(to, new).unwrap_or_else(|error| panic!("cannot write {}: {error}", to.display()));
    }
}
