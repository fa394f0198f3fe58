"""What `config check` looks at, one question a module; `commands.check` asks them all."""
