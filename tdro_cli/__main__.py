from tdro_cli.cli import main

main()
